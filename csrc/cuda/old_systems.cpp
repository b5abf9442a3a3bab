// Older versions of what the CUDA runtime takes from the system, as csrc/common/old_systems.cpp does for the rest.
//
// glibc 2.34 moved libdl, libpthread and librt into libc and gave their functions new versions beside the old ones.
// libcudart_static.a serves any glibc, but is linked to what the linking system has: with CUDA 13.0, 46 functions of
// 2.34. Here it finds jumps to the old versions, and the library needs glibc 2.17. Where those still live in libraries
// of their own, libtorch_cpu has loaded them. A function that is missing here fails `make wheel`.
#include <cstdlib>

#ifdef __GLIBC__

#if defined(__x86_64__)
#define MOS_EXT_JUMP "jmp"
#define MOS_EXT_FAR "@PLT"  // binutils before 2.31 ask for it in a shared library
#define MOS_EXT_OLD "GLIBC_2.2.5"
#define MOS_EXT_OLD_DLMOPEN "GLIBC_2.3.4"
#elif defined(__aarch64__)
#define MOS_EXT_JUMP "b"
#define MOS_EXT_FAR ""
#define MOS_EXT_OLD "GLIBC_2.17"
#define MOS_EXT_OLD_DLMOPEN "GLIBC_2.17"
#else
#error "CUDA kernels are built for x86-64 and aarch64"
#endif

__asm__(R"(
.macro take name, version
  .symver old_\name, \name\()@\version
  .globl \name
  .hidden \name
  .type \name, %function
  .text
\name:
  )" MOS_EXT_JUMP R"( old_\name)" MOS_EXT_FAR R"(
  .size \name, . - \name
.endm
take dlmopen, )" MOS_EXT_OLD_DLMOPEN R"(
.irp name, dlclose, dlerror, dlopen, dlsym, dlvsym, shm_open, shm_unlink
  take \name, )" MOS_EXT_OLD R"(
.endr
.irp name, destroy, init, post, timedwait, trywait, wait
  take sem_\name, )" MOS_EXT_OLD R"(
.endr
.irp name, condattr_setpshared, create, detach, getspecific, join, key_create, key_delete, kill, mutex_trylock, once
  take pthread_\name, )" MOS_EXT_OLD R"(
.endr
.irp name, mutexattr_destroy, mutexattr_init, mutexattr_setpshared, mutexattr_settype, setspecific
  take pthread_\name, )" MOS_EXT_OLD R"(
.endr
.irp name, destroy, init, rdlock, timedrdlock, timedwrlock, tryrdlock, trywrlock, unlock, wrlock
  take pthread_rwlock_\name, )" MOS_EXT_OLD R"(
.endr
.irp name, rwlockattr_destroy, rwlockattr_init, rwlockattr_setpshared
  take pthread_\name, )" MOS_EXT_OLD R"(
.endr
.irp name, destroy, init, lock, trylock, unlock
  take pthread_spin_\name, )" MOS_EXT_OLD R"(
.endr
)");

#endif
