// Checks which variants of the kernels this processor can run. Compiled for the baseline only.

#ifdef __x86_64__

int supports_avx512(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

int supports_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// no kernel is compiled for the baseline of x86: its vectors are too short to be faster than torch
int supports_generic(void) { return 0; }

#else

int supports_avx512(void) { return 0; }
int supports_avx2(void) { return 0; }
int supports_generic(void) { return 1; }

#endif
