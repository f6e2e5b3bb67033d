/* The scales in GGML's blocks, their minima, and the values; unpack.h has the whole numbers.
 * Included once a unit by kernels.h.
 *
 * scales_NAME gives those of all of a block's groups, as in formats/number_formats/.
 */

#if defined(UNIT_AVX512) || defined(UNIT_AVX2)
INLINE float NAME(half)(const uint8_t *p) { return f16c_half(p); }
#else
INLINE float NAME(half)(const uint8_t *p) { return half_at(p); }
#endif

/* Of blocks of 32: a float16, and a second one that is added to each value. */
#define ONE_SCALE(name) \
    INLINE void NAME(scales_##name)(const uint8_t *block, float *scales, float *minima) { \
        (void)minima; \
        scales[0] = NAME(half)(block); \
    }
ONE_SCALE(q8_0)
ONE_SCALE(q4_0)
ONE_SCALE(q5_0)
ONE_SCALE(iq4_nl)
#undef ONE_SCALE
#define AND_LEAST(name) \
    INLINE void NAME(scales_##name)(const uint8_t *block, float *scales, float *minima) { \
        scales[0] = NAME(half)(block), minima[0] = -NAME(half)(block + 2); \
    }
AND_LEAST(q4_1)
AND_LEAST(q5_1)
#undef AND_LEAST

INLINE void NAME(scales_mxfp4)(const uint8_t *block, float *scales, float *minima) {
    (void)minima; /* 2^(byte - 128): below 2 it is subnormal */
    scales[0] = float_of_bits(block[0] < 2 ? 0x200000u << block[0] : (block[0] - 1u) << 23);
}

#if defined(UNIT_AVX512) || defined(UNIT_AVX2)
/* 16 values scale * q - least, of bytes q that have `zero` added. */
INLINE void NAME(sixteen)(__m128i q, int zero, float scale, float least, float *out) {
    if (zero) q = _mm_sub_epi8(q, _mm_set1_epi8((char)zero));
#if defined(UNIT_AVX512)
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), _mm512_set1_ps(scale));
    _mm512_storeu_ps(out, _mm512_sub_ps(v, _mm512_set1_ps(least)));
#else
    for (int i = 0; i < 2; i++, q = _mm_srli_si128(q, 8)) {
        __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
        v = _mm256_mul_ps(v, _mm256_set1_ps(scale));
        _mm256_storeu_ps(out + 8 * i, _mm256_sub_ps(v, _mm256_set1_ps(least)));
    }
#endif
}
INLINE void NAME(scales_q2_K)(const uint8_t *block, float *scales, float *minima) {
    __m128i both = _mm_loadu_si128((const __m128i *)block), low = _mm_set1_epi8(15);
    NAME(sixteen)(_mm_and_si128(both, low), 0, NAME(half)(block + 80), 0, scales);
    both = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    NAME(sixteen)(both, 0, NAME(half)(block + 82), 0, minima);
}
INLINE void NAME(scales_q3_K)(const uint8_t *block, float *scales, float *minima) {
    uint64_t whole[2];
    (void)minima;
    sixteen_of_six_bits(block + 96, whole);
    __m128i q = _mm_set_epi64x((int64_t)whole[1], (int64_t)whole[0]);
    NAME(sixteen)(q, 32, NAME(half)(block + 108), 0, scales);
}
INLINE void NAME(scales_q4_K)(const uint8_t *block, float *scales, float *minima) {
    __m128i q = six_bits_avx2(block + 4);
#if defined(UNIT_AVX512)
    const __m512i eight_times = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    int32_t halves; /* the scale, and the one of minima */
    memcpy(&halves, block, 4);
    __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(halves));
    __m512 each = _mm512_permutexvar_ps(eight_times, _mm512_castps128_ps512(both));
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), each);
    _mm256_storeu_ps(scales, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(minima, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
#else
    const float scale = NAME(half)(block), least = NAME(half)(block + 2);
    float both[16];
    NAME(sixteen)(q, 0, scale, 0, both), memcpy(scales, both, 32);
    NAME(sixteen)(_mm_srli_si128(q, 8), 0, least, 0, both), memcpy(minima, both, 32);
#endif
}
INLINE void NAME(scales_q6_K)(const uint8_t *block, float *scales, float *minima) {
    (void)minima;
    __m128i q = _mm_loadu_si128((const __m128i *)(block + 192));
    NAME(sixteen)(q, 0, NAME(half)(block + 208), 0, scales);
}
INLINE void NAME(scales_iq4_xs)(const uint8_t *block, float *scales, float *minima) {
    float sixteen[16];
    (void)minima;
    __m128i q = _mm_cvtsi64_si128((int64_t)eight_of_six_bits(block + 2));
    NAME(sixteen)(q, 32, NAME(half)(block), 0, sixteen), memcpy(scales, sixteen, 32);
}
#else
/* out[i] = scale * (byte i of `whole` - less) */
INLINE void NAME(eight)(uint64_t whole, int less, float scale, float *out) {
    int8_t bytes[8];
    memcpy(bytes, &whole, 8);
    for (int i = 0; i < 8; i++) out[i] = scale * (bytes[i] - less);
}
INLINE void NAME(scales_q2_K)(const uint8_t *block, float *scales, float *minima) {
    const float scale = NAME(half)(block + 80), least = NAME(half)(block + 82);
    for (int i = 0; i < 16; i += 8) {
        uint64_t both;
        memcpy(&both, block + i, 8);
        NAME(eight)(both & LOW_HALVES, 0, scale, scales + i);
        NAME(eight)(both >> 4 & LOW_HALVES, 0, least, minima + i);
    }
}
INLINE void NAME(scales_q3_K)(const uint8_t *block, float *scales, float *minima) {
    const float scale = NAME(half)(block + 108);
    uint64_t whole[2];
    (void)minima;
    sixteen_of_six_bits(block + 96, whole);
    NAME(eight)(whole[0], 32, scale, scales), NAME(eight)(whole[1], 32, scale, scales + 8);
}
INLINE void NAME(scales_q4_K)(const uint8_t *block, float *scales, float *minima) {
    uint64_t s, m;
    six_bits(block + 4, &s, &m);
    NAME(eight)(s, 0, NAME(half)(block), scales), NAME(eight)(m, 0, NAME(half)(block + 2), minima);
}
INLINE void NAME(scales_q6_K)(const uint8_t *block, float *scales, float *minima) {
    uint64_t whole[2];
    (void)minima;
    memcpy(whole, block + 192, 16);
    for (int i = 0; i < 2; i++) NAME(eight)(whole[i], 0, NAME(half)(block + 208), scales + 8 * i);
}
INLINE void NAME(scales_iq4_xs)(const uint8_t *block, float *scales, float *minima) {
    (void)minima;
    NAME(eight)(eight_of_six_bits(block + 2), 32, NAME(half)(block), scales);
}
#endif

/* Of blocks of 256 that have one scale. */
#define SCALE_AT(name, at) \
    INLINE void NAME(scales_##name)(const uint8_t *block, float *scales, float *minima) { \
        const float scale = NAME(half)(block + at); \
        (void)minima; \
        for (int i = 0; i < 8; i++) scales[i] = scale; \
    }
SCALE_AT(tq1_0, 52)
SCALE_AT(tq2_0, 64)
#undef SCALE_AT

INLINE void NAME(scales_q5_K)(const uint8_t *block, float *scales, float *minima) {
    NAME(scales_q4_K)(block, scales, minima);
}

/* The scales of a row's values from 32 b on, n whole blocks of 32, and their minima, where there
 * are any. Larger blocks begin at b, and are whole. */
static __attribute__((noinline)) void NAME(scales)(int format, const uint8_t *row, int64_t b,
                                                   int64_t n, float *scales, float *minima) {
    const int64_t step = number_formats[format].block / BLOCK;
    const int each = scales_of_32(format);
    row += b / step * number_formats[format].bytes;
    switch (format) {
#define CASE(code, name, block, bytes, ...) \
    case code: \
        for (int64_t i = 0; i < n; i += step, row += bytes) \
            NAME(scales_##name)(row, scales + i * each, minima + i * each); \
        break;
        BLOCK_FORMATS(CASE)
#undef CASE
    }
}

/* The minima of n blocks of 32, from block b on, of formats whose blocks have a scale and one. */
static __attribute__((noinline)) void NAME(only_minima)(int format, const uint8_t *row, int64_t b,
                                                        int64_t n, float *minima) {
    const int64_t bytes = number_formats[format].bytes;
    const uint8_t *least = row + b * bytes + 2;
    int64_t i = 0;
#if defined(UNIT_AVX512) || defined(UNIT_AVX2)
    for (; i + 8 <= n; i += 8, least += 8 * bytes) {
        __m128i halves = _mm_setzero_si128();
#define PUT(k) halves = _mm_insert_epi16(halves, u16_at(least + k * bytes), k);
        PUT(0) PUT(1) PUT(2) PUT(3) PUT(4) PUT(5) PUT(6) PUT(7)
#undef PUT
        __m256 v = _mm256_cvtph_ps(halves);
        _mm256_storeu_ps(minima + i, _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)));
    }
#endif
    for (; i < n; i++, least += bytes) minima[i] = -NAME(half)(least);
}

/* n blocks of 32 values of a row from value 32 b on, each `apart` floats behind the one before. */
#if defined(UNIT_AVX512) || defined(UNIT_AVX2)
INLINE void NAME(thirty_two)(__m256i q, int format, const float *scales, const float *minima,
                             float *out) {
    const int second = scales_of_32(format) - 1;
    const int zero = number_formats[format].zero > 64 ? 0 : number_formats[format].zero;
    NAME(sixteen)(_mm256_castsi256_si128(q), zero, scales[0], minima[0], out);
    NAME(sixteen)(_mm256_extracti128_si256(q, 1), zero, scales[second], minima[second], out + 16);
}
static __attribute__((noinline)) void NAME(decode_blocks)(int format, const uint8_t *row, int64_t b,
                                                          int64_t n, float *out, int64_t apart) {
    float scales[16], minima[16] = {0};
    const uint8_t *known = NULL;
    switch (format) {
#define CASE(code, name, bytes) \
    case code: \
        for (const uint8_t *block = row + b * bytes; n--; block += bytes, out += apart) { \
            NAME(scales_##name)(block, scales, minima); \
            NAME(thirty_two)(one_##name(block), code, scales, minima, out); \
        } \
        break;
        CASE(Q4_1, q4_1, 20)
        CASE(Q5_0, q5_0, 22)
        CASE(Q5_1, q5_1, 24)
        CASE(IQ4_NL, iq4_nl, 18)
        CASE(MXFP4, mxfp4, 17)
#undef CASE
#define CASE(code, name) \
    case code: \
        for (const int each = scales_of_32(code); n > 0; n -= 2, b += 2, out += 2 * apart) { \
            const uint8_t *block = row + b / 8 * number_formats[code].bytes; \
            const int part = b % 8; \
            if (block != known) NAME(scales_##name)(block, scales, minima); \
            known = block; \
            two_blocks two = two_##name(block, part); \
            for (int i = 0; i < 2; i++) \
                NAME(thirty_two)(two.q[i], code, scales + (part + i) * each, \
                                 minima + (part + i) * each, out + i * apart); \
        } \
        break;
        CASE(Q2_K, q2_K)
        CASE(Q3_K, q3_K)
        CASE(Q4_K, q4_K)
        CASE(Q5_K, q5_K)
        CASE(Q6_K, q6_K)
        CASE(IQ4_XS, iq4_xs)
        CASE(TQ1_0, tq1_0)
        CASE(TQ2_0, tq2_0)
#undef CASE
    }
}
#else
static __attribute__((noinline)) void NAME(decode_blocks)(int format, const uint8_t *row, int64_t b,
                                                          int64_t n, float *out, int64_t apart) {
    const uint8_t *known = NULL;
    float scales[16], minima[16] = {0};
    int8_t q[BLOCK];
    for (; n--; b++, out += apart) {
        switch (format) {
#define CASE(code, name, values, bytes, group, ...) \
    case code: { \
        const int64_t part = b % (values / BLOCK); \
        const uint8_t *block = row + b / (values / BLOCK) * bytes; \
        if (block != known) NAME(scales_##name)(block, scales, minima); \
        known = block; \
        unpack_##name(block, part, q); \
        for (int64_t g = 0; g < BLOCK / group; g++) \
            for (int i = 0; i < group; i++) \
                out[g * group + i] = scales[part * (BLOCK / group) + g] * q[g * group + i] - \
                                     minima[part * (BLOCK / group) + g]; \
        break; \
    }
            BLOCK_FORMATS(CASE)
#undef CASE
        }
    }
}
#endif
