// Checks which variants of the kernels this processor can run. Compiled for the baseline only.

#ifdef __x86_64__

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int has_avx512(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

int supports_avx512(void) { return has_avx512(); }

int supports_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// the product on matrix units: the system must also permit this process their registers (since Linux
// 5.16), which is asked here, once for all threads
int supports_amx(void) {
  unsigned a, b, c, d, amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  const int request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16)) return 0;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// no kernel is compiled for the baseline of x86: its vectors are too short to be faster than torch
int supports_generic(void) { return 0; }

#else

int supports_amx(void) { return 0; }
int supports_avx512(void) { return 0; }
int supports_avx2(void) { return 0; }
int supports_generic(void) { return 1; }

#endif
