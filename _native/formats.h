/* The number formats and the activations that the kernels know, each in one table.
 *
 * Codes, sizes and every switch are made from these tables, and Python learns from them which
 * names there are (tables() in sparse_matmul.pxi; flashinfer/kernels compares at import).
 *
 * A new number format is its class in formats/number_formats/ and here its row in a table. One of
 * floats needs load_NAME for each vector unit (vectors.h); one of blocks needs unpack_NAME
 * (unpack.h), two_NAME (unpack_avx2.h), scales_NAME (groups.h), and in blocks.h quants_NAME for
 * AVX-512 with VNNI and a line PORTABLE_QUANTS(CODE, NAME) for the other units. A unit may have a
 * faster quants_NAME of its own instead.
 */
#pragma once

#include "functions.h"

/* X(CODE, name, values in a block, bytes of a block) */
#define FLOAT_FORMATS(X) \
    X(F32, f32, 1, 4) \
    X(F16, f16, 1, 2) \
    X(BF16, bf16, 1, 2)

/* X(CODE, name, values in a block, bytes of a block, values that share a scale, zero point,
 *   whether there are minima): value = scale * q - minimum, where q + zero point is not negative. */
#define BLOCK_FORMATS(X) \
    X(Q8_0, q8_0, 32, 34, 32, 128, 0) \
    X(Q4_0, q4_0, 32, 18, 32, 8, 0) \
    X(Q4_1, q4_1, 32, 20, 32, 0, 1) \
    X(Q5_0, q5_0, 32, 22, 32, 16, 0) \
    X(Q5_1, q5_1, 32, 24, 32, 0, 1) \
    X(Q2_K, q2_K, 256, 84, 16, 0, 1) \
    X(Q3_K, q3_K, 256, 110, 16, 4, 0) \
    X(Q4_K, q4_K, 256, 144, 32, 0, 1) \
    X(Q5_K, q5_K, 256, 176, 32, 0, 1) \
    X(Q6_K, q6_K, 256, 210, 16, 32, 0) \
    X(IQ4_NL, iq4_nl, 32, 18, 32, 128, 0) \
    X(IQ4_XS, iq4_xs, 256, 136, 32, 128, 0) \
    X(MXFP4, mxfp4, 32, 17, 32, 12, 0) \
    X(TQ1_0, tq1_0, 256, 54, 32, 1, 0) \
    X(TQ2_0, tq2_0, 256, 66, 32, 1, 0)

#define NUMBER_FORMATS(X) FLOAT_FORMATS(X) BLOCK_FORMATS(X)

/* X(CODE, name, the activation of v; `threshold` is the caller's) */
#define ACTIVATIONS(X) \
    X(RELU, relu, v > threshold ? v : 0.0f) \
    X(RELU2, relu2, v > threshold ? v * v : 0.0f) \
    X(SILU, silu, v * sigmoid_f32(v)) \
    X(GELU, gelu, v * (0.5f * (1.0f + erf_f32(v * 0.70710678f)))) \
    X(GELU_TANH, gelu_tanh, v * sigmoid_f32(1.5957691216f * (v + 0.044715f * v * v * v))) \
    X(CAP, cap, cap_f32(v, threshold)) \
    X(QUICK_GELU, quick_gelu, v * sigmoid_f32(1.702f * v)) \
    X(SIGMOID, sigmoid, sigmoid_f32(v))

enum { BLOCK = 32 }; /* values that are multiplied as one, where a format has blocks */

#define CODE(code, ...) code,
enum { NUMBER_FORMATS(CODE) N_FORMATS };
enum { ACTIVATIONS(CODE) N_ACTIVATIONS };
#undef CODE

typedef struct {
    const char *name;
    int64_t block, bytes; /* values in a block, bytes of it */
    int group;            /* values that share a scale, where there are scales */
    int zero;             /* the zero point of blocks, otherwise 0 */
    int minima;           /* whether there are any */
} number_format;

#define FLOATS(code, name, block, bytes) {#name, block, bytes, BLOCK, 0, 0},
#define BLOCKS(code, name, block, bytes, group, zero, minima) \
    {#name, block, bytes, group, zero, minima},
static const number_format number_formats[] = {FLOAT_FORMATS(FLOATS) BLOCK_FORMATS(BLOCKS)};
#undef FLOATS
#undef BLOCKS

#define NAMED(code, name, ...) #name,
static const char *const activation_names[] = {ACTIVATIONS(NAMED)};
#undef NAMED

/* As long as the longest block of 32 values. */
#define MEMBER(code, name, block, bytes, ...) uint8_t name[block == BLOCK ? bytes : 1];
typedef union { BLOCK_FORMATS(MEMBER) } block_of_32;
#undef MEMBER

INLINE int has_blocks(int format) { return number_formats[format].block > 1; }

/* Scales that 32 values have. */
INLINE int scales_of_32(int format) { return BLOCK / number_formats[format].group; }

/* Bytes from the beginning of a row to its value j, a multiple of 32: of a larger block about. */
INLINE int64_t bytes_before(int format, int64_t j) {
    return j * number_formats[format].bytes / number_formats[format].block;
}

INLINE int64_t bytes_of_32(int format) { return bytes_before(format, 32); }

/* Bytes of a row of d values, or -1 where a format has no such row. */
static int64_t bytes_of_row(int format, int64_t d) {
    const number_format *f = &number_formats[format];
    return d % f->block ? -1 : d / f->block * f->bytes;
}

INLINE float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float f = float_of_bits(rest << 13) * 0x1p112f; /* exact, subnormals included */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return float_of_bits(bits | sign);
}

/* To the nearest float16, ties to even, as NumPy and the CPUs round. */
INLINE uint16_t f32_to_f16(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000, bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;  /* not a number */
    if (bits >= 0x47800000) return sign | 0x7c00; /* 2^16 and more: infinite */
    if (bits < 0x38800000) {                      /* below 2^-14: the adder rounds to 2^-24 */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | ((bits >> 13) - (112 << 10));
}

INLINE uint16_t u16_at(const uint8_t *p) {
    uint16_t value;
    memcpy(&value, p, 2);
    return value;
}

/* The float16 at p. */
INLINE float half_at(const uint8_t *p) { return f16_to_f32(u16_at(p)); }
