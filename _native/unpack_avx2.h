/* What unpack.h gives, by AVX2 for every vector unit of x86: two parts of a block at a time, from
 * `part` on, which is even; of blocks of 32 two that follow each other. Included by kernels.h where
 * AVX2 is allowed.
 *
 * The numbers are as AVX2 multiplies them: with the format's zero point added, unless it is above 64;
 * then they are signed.
 */
#pragma once

typedef struct { __m256i q[2]; } two_blocks;

INLINE __m256i load_32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE __m256i bits_at(__m256i v, int shift, int mask) { /* within each byte */
    return _mm256_and_si256(_mm256_srli_epi16(v, shift), _mm256_set1_epi8((char)mask));
}
INLINE __m256i raised(__m256i v, int shift) { /* no bit of it may leave its byte */
    return _mm256_slli_epi16(v, shift);
}

/* 16 bytes: their low halves, and behind them their high ones. */
INLINE __m256i halves_avx2(const uint8_t *packed) {
    __m128i x = _mm_loadu_si128((const __m128i *)packed);
    return bits_at(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), 0, 15);
}
/* 32 bits, each as bit 4 of a byte. */
INLINE __m256i fifths_avx2(const uint8_t *packed) {
    int32_t bits;
    memcpy(&bits, packed, 4);
    const __m256i byte_of = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                              0x0101010101010101, 0);
    const __m256i bit_of = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    return _mm256_and_si256(set, _mm256_set1_epi8(16));
}
INLINE __m256i look_up_avx2(const int8_t *table, int add, __m256i q) {
    __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return _mm256_add_epi8(_mm256_shuffle_epi8(entries, q), _mm256_set1_epi8((char)add));
}

/* What six_bits gives: 8 scales and then 8 minima, a byte each. */
INLINE __m128i six_bits_avx2(const uint8_t *packed) {
    __m128i x = _mm_loadu_si128((const __m128i *)packed); /* 4 bytes behind them, too */
    __m128i low = _mm_shuffle_epi8(x, _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 8, 9, 10, 11));
    __m128i high = _mm_shuffle_epi8(
        x, _mm_setr_epi8(-1, -1, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7));
    low = _mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 0, 4));
    low = _mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    return _mm_or_si128(low, _mm_and_si128(_mm_srli_epi16(high, 2), _mm_set1_epi8(0x30)));
}

/* Of blocks of 32, which follow each other: `of` is a block's 32 numbers. */
#define TWO_BLOCKS(name, size, of) \
    INLINE __m256i one_##name(const uint8_t *block) { return of(block); } \
    INLINE two_blocks two_##name(const uint8_t *block, int part) { \
        const uint8_t *next = block + size; \
        (void)part; \
        return (two_blocks){{of(block), of(next)}}; \
    }
#define OF(block) halves_avx2(block + 4)
TWO_BLOCKS(q4_1, 20, OF)
#undef OF
#define OF(block) _mm256_or_si256(halves_avx2(block + 6), fifths_avx2(block + 2))
TWO_BLOCKS(q5_0, 22, OF)
#undef OF
#define OF(block) _mm256_or_si256(halves_avx2(block + 8), fifths_avx2(block + 4))
TWO_BLOCKS(q5_1, 24, OF)
#undef OF
#define OF(block) look_up_avx2(uneven, 0, halves_avx2(block + 2))
TWO_BLOCKS(iq4_nl, 18, OF)
#undef OF
#define OF(block) look_up_avx2(e2m1, 12, halves_avx2(block + 1))
TWO_BLOCKS(mxfp4, 17, OF)
#undef OF
#undef TWO_BLOCKS

INLINE two_blocks two_iq4_xs(const uint8_t *block, int part) {
    const uint8_t *packed = block + 8 + part * 16;
    return (two_blocks){{look_up_avx2(uneven, 0, halves_avx2(packed)),
                         look_up_avx2(uneven, 0, halves_avx2(packed + 16))}};
}
/* Part `part` of tq1_0, see `thirds`: bytes are multiplied as halves of 16 bits, and the digits
 * counted. */
INLINE __m256i digits_avx2(const uint8_t *block, int part) {
    int64_t eight;
    int32_t four;
    memcpy(&eight, thirds[part], 8), memcpy(&four, block + 48, 4);
    const __m256i each_four = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404,
                                                0x05050505, 0x06060606, 0x07070707);
    __m256i powers = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), each_four), packed;
    __m128i later = _mm_loadu_si128((const __m128i *)(block + 32));
    if (part < 5) packed = load_32(block);
    else packed = _mm256_set_m128i(part < 7 ? later : _mm_set1_epi32(four), later);
    const __m256i low = _mm256_set1_epi16(255);
    __m256i even = _mm256_mullo_epi16(_mm256_and_si256(packed, low), _mm256_and_si256(powers, low));
    __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(packed, 8), _mm256_srli_epi16(powers, 8));
    __m256i v = _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(odd, 8));
    const __m256i one = _mm256_set1_epi8(86), two = _mm256_set1_epi8((char)171); /* of 256 / 3 */
    __m256i digits = _mm256_add_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, one), v),
                                     _mm256_cmpeq_epi8(_mm256_max_epu8(v, two), v));
    return _mm256_sub_epi8(_mm256_setzero_si256(), digits);
}
INLINE two_blocks two_tq1_0(const uint8_t *block, int part) {
    return (two_blocks){{digits_avx2(block, part), digits_avx2(block, part + 1)}};
}
INLINE two_blocks two_tq2_0(const uint8_t *block, int part) {
    __m256i low = load_32(block + part / 4 * 32);
    return (two_blocks){{bits_at(low, part % 4 * 2, 3), bits_at(low, part % 4 * 2 + 2, 3)}};
}
INLINE two_blocks two_q2_K(const uint8_t *block, int part) {
    __m256i low = load_32(block + 16 + part / 4 * 32);
    return (two_blocks){{bits_at(low, part % 4 * 2, 3), bits_at(low, part % 4 * 2 + 2, 3)}};
}
INLINE two_blocks two_q3_K(const uint8_t *block, int part) {
    __m256i low = load_32(block + 32 + part / 4 * 32), third = load_32(block);
    two_blocks two;
    for (int i = 0; i < 2; i++)
        two.q[i] = _mm256_or_si256(bits_at(low, (part + i) % 4 * 2, 3),
                                   raised(bits_at(third, part + i, 1), 2));
    return two;
}
INLINE two_blocks two_q4_K(const uint8_t *block, int part) {
    __m256i both = load_32(block + 16 + part * 16);
    return (two_blocks){{bits_at(both, 0, 15), bits_at(both, 4, 15)}};
}
INLINE two_blocks two_q5_K(const uint8_t *block, int part) {
    __m256i low = load_32(block + 48 + part * 16), fifth = load_32(block + 16);
    two_blocks two;
    for (int i = 0; i < 2; i++)
        two.q[i] = _mm256_or_si256(bits_at(low, 4 * i, 15),
                                   raised(bits_at(fifth, part + i, 1), 4));
    return two;
}
INLINE two_blocks two_q6_K(const uint8_t *block, int part) {
    const uint8_t *low = block + part / 4 * 64;
    __m256i high = load_32(block + 128 + part / 4 * 32);
    two_blocks two;
    for (int i = 0; i < 2; i++)
        two.q[i] = _mm256_or_si256(bits_at(load_32(low + 32 * i), part % 4 / 2 * 4, 15),
                                   raised(bits_at(high, (part + i) % 4 * 2, 3), 4));
    return two;
}
