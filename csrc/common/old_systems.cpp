// What a newer compiler takes from newer system libraries than the kernels need, defined here.
//
// Of these the headers of gcc 12 make a library that needs glibc 2.32 and libstdc++ 3.4.29, those of gcc 14 one that
// needs 3.4.32. With these definitions both need 2.16 and 3.4.21, of 2012 and 2015; torch's own wheels need glibc 2.28.
// exports.map keeps them inside the library; they are weak, so that whoever links libstdc++ statically has its own.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

#include <cxxabi.h>

#include <exception>
#include <new>

// shared_ptr counts without atomics in a process of one thread, as of glibc 2.32; here it always counts with them.
extern "C" {
__attribute__((weak)) char __libc_single_threaded = 0;
}

// What std::vector throws for more bytes than there are addresses, as of libstdc++ 3.4.29. By its symbol: headers of
// older compilers do not declare it.
[[noreturn]] __attribute__((weak)) void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// <iostream> asks libstdc++ 3.4.32 to have initialised std::cout and its like, which nothing here uses.
__attribute__((weak)) void ios_base_library_init() __asm__("_ZSt21ios_base_library_initv");
void ios_base_library_init() {}

// The end of an exception that leaves a noexcept function, as of gcc 14 (CXXABI 1.3.15).
extern "C" [[noreturn]] __attribute__((weak)) void __cxa_call_terminate(void* exception) noexcept {
  if (exception) abi::__cxa_begin_catch(exception);
  std::terminate();
}

// Streams' default constructors, which torch's headers put messages together with, are exported as of 3.4.26.
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

#endif
