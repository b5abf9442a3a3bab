// What a newer compiler takes from newer system libraries than the kernels need, defined here.
//
// gcc 12's headers make a library that needs glibc 2.32 and libstdc++ 3.4.29 of three things in them. With these
// definitions it needs 2.16 and 3.4.21, of 2012 and 2015: torch's own wheels need 2.28. csrc/exports.map keeps
// them inside the library.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

#include <new>

// shared_ptr counts without atomics in a process of one thread, as of glibc 2.32; here it always counts with them.
extern "C" {
char __libc_single_threaded = 0;
}

// What std::vector throws for more bytes than there are addresses, as of libstdc++ 3.4.29. By its symbol: headers of
// older compilers do not declare it.
[[noreturn]] void throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// Streams' default constructors, which torch's headers put messages together with, are exported as of 3.4.26.
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

#endif
