// Included before every source of the CPU library: binds to the oldest versions of what glibc 2.29 gave new ones, so that a library built on a new system runs on one with 2.28. The
// two differ in errno alone.
#pragma once

#include <stdlib.h>  // says which C library it is

#if defined(__linux__) && defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver exp2,exp2@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver log2,log2@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
#endif
