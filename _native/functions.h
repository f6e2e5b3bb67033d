/* Exponentials and what is made of them: the same bits on every CPU, which libraries do not give. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }

INLINE uint32_t bits_of_float(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

/* e^x for x <= 0, within 2 units in the last place, the same bits on every CPU. It has no branch,
 * and what is chosen no second condition, so that compilers can make vectors of it. A NaN stays. */
INLINE float exp_f32(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    float least = x <= -87.0f ? -87.0f : x;
    float shifted = __builtin_fmaf(least, 1.44269504f, magic);
    float k = shifted - magic;
    float r = __builtin_fmaf(k, -0.693359375f, least);
    r = __builtin_fmaf(k, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r + 1.0f);
    p *= float_of_bits((bits_of_float(shifted) - bits_of_float(magic) + 127) << 23);
    return x <= -87.0f ? 0.0f : p;
}

INLINE float sigmoid_f32(float x) {
    float e = exp_f32(x < 0 ? x : -x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

/* c tanh(x / c), which never leaves -c to c. Near 0 it is the series, whose error is that of x: a
   difference of two numbers near 1/2 would have that of c. */
INLINE float cap_f32(float x, float c) {
    float t = x * (1.0f / c), square = t * t;
    float series = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315))));
    float far = c * (2.0f * sigmoid_f32(x * (2.0f / c)) - 1.0f);
    return fabsf(t) < 0.125f ? series : far;
}

/* Within 1.5e-7 (Abramowitz and Stegun 7.1.26). */
INLINE float erf_f32(float x) {
    float size = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * size);
    float p = 1.061405429f * t;
    p = (p - 1.453152027f) * t;
    p = (p + 1.421413741f) * t;
    p = (p - 0.284496736f) * t;
    p = (p + 0.254829592f) * t;
    return copysignf(1.0f - p * exp_f32(-size * size), x);
}
