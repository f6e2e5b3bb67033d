/* The whole numbers in GGML's blocks, as in formats/number_formats/.
 *
 * unpack_NAME gives 32 of a block's: those of group `part`, or where groups are smaller of two of
 * them. The loops are such that compilers make vectors of them.
 */
#pragma once

#include "formats.h"

static const int8_t uneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* 16 bytes hold value i in their low halves and value i + 16 in their high ones. */
INLINE void halves(const uint8_t *packed, int8_t *q) {
    for (int i = 0; i < 16; i++) q[i] = packed[i] & 15;
    for (int i = 0; i < 16; i++) q[i + 16] = packed[i] >> 4;
}

/* Adds to 32 numbers their fifth bits, which 4 bytes hold in order. */
INLINE void add_fifths(const uint8_t *packed, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] |= (packed[i / 8] >> i % 8 & 1) << 4;
}

INLINE void less(int by, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] -= by;
}

INLINE void look_up(const int8_t *table, int8_t *q) {
    for (int i = 0; i < 32; i++) q[i] = table[q[i]];
}

INLINE void unpack_q8_0(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    memcpy(q, block + 2, BLOCK);
}
INLINE void unpack_q4_0(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 2, q), less(8, q);
}
INLINE void unpack_q4_1(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 4, q);
}
INLINE void unpack_q5_0(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 6, q), add_fifths(block + 2, q), less(16, q);
}
INLINE void unpack_q5_1(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 8, q), add_fifths(block + 4, q);
}
INLINE void unpack_iq4_nl(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 2, q), look_up(uneven, q);
}
INLINE void unpack_mxfp4(const uint8_t *block, int part, int8_t *q) {
    (void)part;
    halves(block + 1, q), look_up(e2m1, q);
}
INLINE void unpack_iq4_xs(const uint8_t *block, int part, int8_t *q) {
    halves(block + 8 + 16 * part, q), look_up(uneven, q);
}
/* Of each part of tq1_0 the factors of its fours of values: a value is 3 / 256 of its byte times the
 * factor, modulo 256, rounded down. */
static const uint8_t thirds[8][8] = {
    {1, 1, 1, 1, 1, 1, 1, 1},         {3, 3, 3, 3, 3, 3, 3, 3},
    {9, 9, 9, 9, 9, 9, 9, 9},         {27, 27, 27, 27, 27, 27, 27, 27},
    {81, 81, 81, 81, 81, 81, 81, 81}, {1, 1, 1, 1, 3, 3, 3, 3},
    {9, 9, 9, 9, 27, 27, 27, 27},     {81, 81, 81, 81, 1, 3, 9, 27}};
INLINE void unpack_tq1_0(const uint8_t *block, int part, int8_t *q) {
    for (int i = 0; i < 32; i++) {
        uint8_t packed = part < 5 ? block[i] : part < 7 || i < 16 ? block[32 + i % 16] : block[48 + i % 4];
        q[i] = (int8_t)((uint8_t)(packed * thirds[part][i / 4]) * 3 >> 8);
    }
    less(1, q);
}
INLINE void unpack_tq2_0(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + part / 4 * 32;
    for (int i = 0; i < 32; i++) q[i] = low[i] >> part % 4 * 2 & 3;
    less(1, q);
}
INLINE void unpack_q2_K(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + 16 + part / 4 * 32;
    for (int i = 0; i < 32; i++) q[i] = low[i] >> part % 4 * 2 & 3;
}
INLINE void unpack_q3_K(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + 32 + part / 4 * 32;
    for (int i = 0; i < 32; i++)
        q[i] = (low[i] >> part % 4 * 2 & 3) + (block[i] >> part & 1) * 4 - 4;
}
INLINE void unpack_q4_K(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + 16 + part / 2 * 32;
    for (int i = 0; i < 32; i++) q[i] = low[i] >> part % 2 * 4 & 15;
}
INLINE void unpack_q5_K(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + 48 + part / 2 * 32, *fifths = block + 16;
    for (int i = 0; i < 32; i++)
        q[i] = (low[i] >> part % 2 * 4 & 15) | (fifths[i] >> part & 1) << 4;
}
INLINE void unpack_q6_K(const uint8_t *block, int part, int8_t *q) {
    const uint8_t *low = block + part / 4 * 64 + part % 2 * 32, *high = block + 128 + part / 4 * 32;
    for (int i = 0; i < 32; i++)
        q[i] = ((low[i] >> part % 4 / 2 * 4 & 15) | (high[i] >> part % 4 * 2 & 3) << 4) - 32;
}

#define LOW_HALVES 0x0f0f0f0f0f0f0f0fu /* of eight bytes */

/* The 8 scales and 8 minima of 6 bits that q4_K and q5_K hold in 12 bytes, a byte each. */
INLINE void six_bits(const uint8_t *packed, uint64_t *scales, uint64_t *minima) {
    uint32_t a, b, c;
    memcpy(&a, packed, 4), memcpy(&b, packed + 4, 4), memcpy(&c, packed + 8, 4);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
    *scales = (a & six) | (uint64_t)((c & four) | (a >> 6 & two) << 4) << 32;
    *minima = (b & six) | (uint64_t)((c >> 4 & four) | (b >> 6 & two) << 4) << 32;
}

/* The 16 scales of 6 bits that q3_K holds in 12 bytes, a byte each. */
INLINE void sixteen_of_six_bits(const uint8_t *packed, uint64_t scales[2]) {
    uint32_t high;
    uint64_t low;
    memcpy(&low, packed, 8), memcpy(&high, packed + 8, 4);
    const uint32_t two = 0x03030303;
    const uint64_t first = (high & two) | (uint64_t)(high >> 2 & two) << 32;
    const uint64_t second = (high >> 4 & two) | (uint64_t)(high >> 6 & two) << 32;
    scales[0] = (low & LOW_HALVES) | first << 4;
    scales[1] = (low >> 4 & LOW_HALVES) | second << 4;
}

/* The 8 scales of 6 bits that iq4_xs holds in 6 bytes: the high two bits, then the others. */
INLINE uint64_t eight_of_six_bits(const uint8_t *packed) {
    uint16_t twos;
    uint32_t fours;
    memcpy(&twos, packed, 2), memcpy(&fours, packed + 2, 4);
    uint64_t high = twos, low = fours; /* spread over eight bytes, by halves */
    high = (high | high << 24) & 0x000000ff000000ffu;
    high = (high | high << 12) & 0x000f000f000f000fu;
    high = (high | high << 6) & 0x0303030303030303u;
    low = (low | low << 16) & 0x0000ffff0000ffffu;
    low = (low | low << 8) & 0x00ff00ff00ff00ffu;
    low = (low | low << 4) & LOW_HALVES;
    return low | high << 4;
}
