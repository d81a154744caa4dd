/*
 * What this processor can do. Only the kernels' dispatch and its tests ask.
 *
 * Thread safety: slu_cpu_flags may be called from any thread; slu_cpu_set_mask before the first
 * engine is created.
 */
#ifndef SLU_BASE_CPU_H
#define SLU_BASE_CPU_H

#define SLU_CPU_AVX2     (1u << 0) /* with FMA and F16C, as every AVX2 machine has them */
#define SLU_CPU_AVX_VNNI (1u << 1) /* and AVX2 */
#define SLU_CPU_AVX512   (1u << 2) /* F, BW, DQ, VL, VBMI and VNNI; GFNI and AVX2 */
#define SLU_CPU_DOTPROD  (1u << 3) /* NEON with sdot */
#define SLU_CPU_I8MM     (1u << 4) /* and with smmla */

/* Flags of this processor and operating system, less those masked off. */
unsigned slu_cpu_flags(void);

/* Keeps only the flags in `mask`: for tests and for comparing kernels. All ones is the default. */
void slu_cpu_set_mask(unsigned mask);

#endif
