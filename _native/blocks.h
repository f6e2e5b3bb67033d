/* What a vector unit has for products of GGML's blocks with activations of 8 bits. Included once a
 * unit by kernels.h.
 *
 * Two blocks of 32 at a time: 16 whole numbers, each the sum of four products, times the blocks'
 * scales, are added to 16 float32 lanes. The whole numbers are exact, and every unit adds the same
 * lanes in the same order: the same bits.
 *
 * Each unit says here how it adds, and what it takes of a format: quants_NAME gives the whole
 * numbers of two blocks, 64 bytes in their order, as it multiplies them. Formats that a unit has no
 * quants_ of its own for get them from PORTABLE_QUANTS.
 */

#if defined(UNIT_VNNI)

typedef struct { __m512 q; } NAME(lanes);
typedef struct { __m512i q; } NAME(ints);
typedef NAME(ints) NAME(weights);
typedef struct { __m512 q; } NAME(pair_scales);
#define ROW_BLOCK_8BIT 4

INLINE NAME(lanes) NAME(no_lanes)(void) { return (NAME(lanes)){_mm512_setzero_ps()}; }
INLINE NAME(weights) NAME(quants_q8_0)(const uint8_t *block, int part) {
    (void)part;
    __m512i w = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(block + 2))),
        _mm256_loadu_si256((const __m256i *)(block + bytes_of_32(Q8_0) + 2)), 1);
    return (NAME(weights)){_mm512_xor_si512(w, _mm512_set1_epi8((char)128))};
}
/* The low halves of 16 bytes, their high ones, and the same of 16 others. */
INLINE NAME(weights) NAME(nibbles)(const uint8_t *first, const uint8_t *second) {
    __m512i both = _mm512_mask_broadcast_i32x4(
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)first)), 0xff00,
        _mm_loadu_si128((const __m128i *)second));
    both = _mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0));
    return (NAME(weights)){_mm512_and_si512(both, _mm512_set1_epi8(15))};
}
/* The entries of a table, `add` added, that halves of bytes name. */
INLINE NAME(weights) NAME(looked_up)(const int8_t *table, int add, NAME(weights) w) {
    __m128i entries = _mm_add_epi8(_mm_loadu_si128((const __m128i *)table), _mm_set1_epi8((char)add));
    return (NAME(weights)){_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), w.q)};
}
/* 32 bytes, and the same once more. */
INLINE __m512i NAME(twice)(const uint8_t *p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}
/* Shifts right within 64 bits: the first 32 bytes by `first`, the others by `second`, in a circle. */
INLINE __m512i NAME(turned)(__m512i v, int first, int second) {
    const int64_t a = first & 63, b = second & 63;
    return _mm512_rorv_epi64(v, _mm512_set_epi64(b, b, b, b, a, a, a, a));
}
/* In each byte the bits of `mask` from `low`, the others of `all` from `high`. */
INLINE NAME(weights) NAME(joined)(__m512i low, int mask, __m512i high, int all) {
    __m512i both = _mm512_ternarylogic_epi64(_mm512_set1_epi8((char)mask), low, high, 0xca);
    return (NAME(weights)){_mm512_and_si512(both, _mm512_set1_epi8((char)all))};
}
/* Adds 16 to those of 64 numbers whose bit is set, in 4 bytes for each half. */
INLINE NAME(weights) NAME(and_fifths)(NAME(weights) w, const uint8_t *first, const uint8_t *second) {
    uint32_t low, high;
    memcpy(&low, first, 4), memcpy(&high, second, 4);
    const __mmask64 set = low | (uint64_t)high << 32;
    return (NAME(weights)){_mm512_mask_add_epi8(w.q, set, w.q, _mm512_set1_epi8(16))};
}
/* Of blocks of 32, this one and the next. */
#define NEXT(code, name, of) \
    INLINE NAME(weights) NAME(quants_##name)(const uint8_t *block, int part) { \
        const uint8_t *next = block + bytes_of_32(code); \
        (void)part; \
        return of; \
    }
NEXT(Q4_0, q4_0, NAME(nibbles)(block + 2, next + 2))
NEXT(Q4_1, q4_1, NAME(nibbles)(block + 4, next + 4))
NEXT(Q5_0, q5_0, NAME(and_fifths)(NAME(nibbles)(block + 6, next + 6), block + 2, next + 2))
NEXT(Q5_1, q5_1, NAME(and_fifths)(NAME(nibbles)(block + 8, next + 8), block + 4, next + 4))
NEXT(IQ4_NL, iq4_nl, NAME(looked_up)(uneven, 128, NAME(nibbles)(block + 2, next + 2)))
NEXT(MXFP4, mxfp4, NAME(looked_up)(e2m1, 12, NAME(nibbles)(block + 1, next + 1)))
#undef NEXT
INLINE NAME(weights) NAME(quants_iq4_xs)(const uint8_t *block, int part) {
    const uint8_t *packed = block + 8 + part * 16;
    return NAME(looked_up)(uneven, 128, NAME(nibbles)(packed, packed + 16));
}
INLINE NAME(weights) NAME(quants_tq1_0)(const uint8_t *block, int part) {
    const __m512i each_four = _mm512_set_epi32(
        0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
        0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    const __m512i low = _mm512_set1_epi16(255);
    __m512i powers = _mm512_shuffle_epi8( /* of this part and the next */
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)thirds[part])), each_four);
    __m512i packed = NAME(twice)(block);
    if (part >= 4) {
        int32_t four;
        memcpy(&four, block + 48, 4);
        __m512i later = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(block + 32)));
        if (part == 4) packed = _mm512_mask_mov_epi64(packed, 0xf0, later);
        else packed = _mm512_mask_mov_epi64(later, 0xc0, _mm512_set1_epi32(four));
    }
    __m512i even = _mm512_mullo_epi16(packed, _mm512_and_si512(powers, low));
    __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(packed, 8), _mm512_srli_epi16(powers, 8));
    __m512i v = _mm512_ternarylogic_epi64(low, even, _mm512_slli_epi16(odd, 8), 0xca);
    __mmask64 one = _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8(86));
    __mmask64 two = _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8((char)171));
    __m512i q = _mm512_maskz_set1_epi8(one, 1);
    return (NAME(weights)){_mm512_mask_set1_epi8(q, two, 2)};
}
INLINE NAME(weights) NAME(quants_tq2_0)(const uint8_t *block, int part) {
    const int at = part % 4 * 2;
    __m512i low = NAME(turned)(NAME(twice)(block + part / 4 * 32), at, at + 2);
    return (NAME(weights)){_mm512_and_si512(low, _mm512_set1_epi8(3))};
}
INLINE NAME(weights) NAME(quants_q2_K)(const uint8_t *block, int part) {
    const int at = part % 4 * 2;
    __m512i low = NAME(turned)(NAME(twice)(block + 16 + part / 4 * 32), at, at + 2);
    return (NAME(weights)){_mm512_and_si512(low, _mm512_set1_epi8(3))};
}
INLINE NAME(weights) NAME(quants_q3_K)(const uint8_t *block, int part) {
    const int at = part % 4 * 2;
    return NAME(joined)(NAME(turned)(NAME(twice)(block + 32 + part / 4 * 32), at, at + 2), 3,
                        NAME(turned)(NAME(twice)(block), part - 2, part - 1), 7);
}
INLINE NAME(weights) NAME(quants_q4_K)(const uint8_t *block, int part) {
    __m512i both = NAME(turned)(NAME(twice)(block + 16 + part * 16), 0, 4);
    return (NAME(weights)){_mm512_and_si512(both, _mm512_set1_epi8(15))};
}
INLINE NAME(weights) NAME(quants_q5_K)(const uint8_t *block, int part) {
    return NAME(joined)(NAME(turned)(NAME(twice)(block + 48 + part * 16), 0, 4), 15,
                        NAME(turned)(NAME(twice)(block + 16), part - 4, part - 3), 31);
}
INLINE NAME(weights) NAME(quants_q6_K)(const uint8_t *block, int part) {
    const int at = part % 4 * 2;
    __m512i low = _mm512_loadu_si512(block + part / 4 * 64);
    if (at / 4) low = _mm512_srli_epi64(low, 4);
    return NAME(joined)(low, 15, NAME(turned)(NAME(twice)(block + 128 + part / 4 * 32), at - 4, at - 2),
                        63);
}
INLINE NAME(ints) NAME(products)(int format, NAME(weights) w, const int8_t *q, const int32_t *less) {
    (void)format;
    return (NAME(ints)){
        _mm512_dpbusd_epi32(_mm512_loadu_si512(less), w.q, _mm512_loadu_si512(q))};
}
INLINE NAME(pair_scales) NAME(two)(float first, float second) {
    return (NAME(pair_scales)){
        _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second))};
}
/* The first two values, for 8 lanes each. */
INLINE NAME(pair_scales) NAME(eight_times)(__m128 both) {
    return (NAME(pair_scales)){_mm512_permutexvar_ps(
        _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        _mm512_castps128_ps512(both))};
}
INLINE NAME(pair_scales) NAME(two_halves)(const uint8_t *first, const uint8_t *second) {
    __m128i halves = _mm_insert_epi16(_mm_setzero_si128(), u16_at(first), 0);
    return NAME(eight_times)(_mm_cvtph_ps(_mm_insert_epi16(halves, u16_at(second), 1)));
}
/* Half of 2^(byte - 127), which of a byte of 0 is subnormal. The lanes that nobody reads are not, as
 * a product with a subnormal number takes many times as long. */
INLINE NAME(pair_scales) NAME(two_powers)(const uint8_t *first, const uint8_t *second) {
    __m128i bytes = _mm_insert_epi8(_mm_set1_epi32(127), *first, 0);
    bytes = _mm_insert_epi8(bytes, *second, 4);
    __m128i power = _mm_max_epi32(_mm_slli_epi32(bytes, 23), _mm_set1_epi32(0x400000));
    return NAME(eight_times)(_mm_mul_ps(_mm_castsi128_ps(power), _mm_set1_ps(0.5f)));
}
INLINE NAME(pair_scales) NAME(pair)(int format, const float *scales) {
    if (scales_of_32(format) == 1) return NAME(two)(scales[0], scales[1]);
    return (NAME(pair_scales)){_mm512_permutexvar_ps(
        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
        _mm512_castps128_ps512(_mm_loadu_ps(scales)))};
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, NAME(pair_scales) w,
                             NAME(pair_scales) x) {
    __m512 scales = _mm512_mul_ps(w.q, x.q);
    return (NAME(lanes)){_mm512_fmadd_ps(_mm512_cvtepi32_ps(p.q), scales, sums.q)};
}

typedef __m512 NAME(lanes_8bit);
typedef __m512i NAME(row_8bit);
#define GROUP_8BIT 64
#define HALVES_8BIT 1
#define TILE_ROWS_8BIT 4
#define TILE_TOKENS_8BIT 4
INLINE __m512 NAME(zero_8bit)(void) { return _mm512_setzero_ps(); }
INLINE __m512i NAME(load_row_8bit)(const uint8_t *w) { return _mm512_load_si512(w); }
/* Fours of the two, or four, groups in turn, so that one broadcast brings all their scales. */
INLINE void NAME(spread)(int format, const void *from, uint8_t *to, int64_t apart) {
    const __m512i two = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i four = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i order = scales_of_32(format) == 1 ? two : four;
    (void)apart;
    _mm512_store_si512(to, _mm512_permutexvar_epi32(order, _mm512_loadu_si512(from)));
}
INLINE __m512 NAME(fma_8bit)(int format, __m512i w, const uint8_t *x, const float *scales,
                             __m512 sum) {
    __m512i p = _mm512_dpbusd_epi32(_mm512_load_si512(x + 64), w, _mm512_load_si512(x));
    double two;
    memcpy(&two, scales, sizeof two);
    __m512 each = scales_of_32(format) == 1 ? _mm512_castpd_ps(_mm512_set1_pd(two))
                                            : _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), each, sum);
}
INLINE void NAME(multiply_8bit)(const float *w, const float *x, float *to) { /* SCALE_STEPS' scales */
    _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(w), _mm512_load_ps(x)));
}
INLINE void NAME(store_8bit)(int format, float *to, __m512 sum) { /* undoes `spread` */
    const __m512i two = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i four = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_store_ps(to, _mm512_permutexvar_ps(scales_of_32(format) == 1 ? two : four, sum));
}
INLINE float NAME(total)(NAME(lanes) sums) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums.q), 1));
    return sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(sums.q), high));
}

#elif defined(UNIT_AVX2)

typedef struct { __m256 q[2]; } NAME(lanes);
typedef struct { __m256i q[2]; } NAME(ints);
typedef NAME(ints) NAME(weights);
typedef struct { __m256 q[2]; } NAME(pair_scales);
#define ROW_BLOCK_8BIT 1

INLINE NAME(lanes) NAME(no_lanes)(void) {
    return (NAME(lanes)){{_mm256_setzero_ps(), _mm256_setzero_ps()}};
}
INLINE NAME(pair_scales) NAME(two)(float first, float second) {
    return (NAME(pair_scales)){{_mm256_set1_ps(first), _mm256_set1_ps(second)}};
}
INLINE NAME(pair_scales) NAME(pair)(int format, const float *s) {
    if (scales_of_32(format) == 1) return NAME(two)(s[0], s[1]);
    return (NAME(pair_scales)){{_mm256_set_m128(_mm_set1_ps(s[1]), _mm_set1_ps(s[0])),
                                _mm256_set_m128(_mm_set1_ps(s[3]), _mm_set1_ps(s[2]))}};
}
/* Weights are unsigned where the sum of two products stays within 16 bits. */
#define SIGNED(zero) ((zero) > 64)
INLINE NAME(weights) NAME(quants_q8_0)(const uint8_t *block, int part) {
    (void)part;
    NAME(weights) w;
    for (int b = 0; b < 2; b++, block += bytes_of_32(Q8_0))
        w.q[b] = _mm256_loadu_si256((const __m256i *)(block + 2));
    return w;
}
INLINE NAME(weights) NAME(quants_q4_0)(const uint8_t *block, int part) {
    (void)part;
    NAME(weights) w;
    for (int b = 0; b < 2; b++, block += bytes_of_32(Q4_0)) {
        __m128i packed = _mm_loadu_si128((const __m128i *)(block + 2)), low = _mm_set1_epi8(15);
        w.q[b] = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), low),
                                  _mm_and_si128(packed, low));
    }
    return w;
}
INLINE NAME(weights) NAME(stored)(two_blocks two, int zero) {
    (void)zero;
    return (NAME(weights)){{two.q[0], two.q[1]}};
}
INLINE NAME(ints) NAME(products)(int format, NAME(weights) w, const int8_t *q, const int32_t *less) {
    __m256i one = _mm256_set1_epi16(1);
    NAME(ints) p;
    for (int b = 0; b < 2; b++) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(q + b * BLOCK));
        if (SIGNED(number_formats[format].zero)) { /* |w| times x with w's sign: pairs stay within 16 bits */
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w.q[b]), _mm256_sign_epi8(x, w.q[b]));
            p.q[b] = _mm256_madd_epi16(pairs, one);
        } else {
            p.q[b] = _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(w.q[b], x), one),
                                      _mm256_loadu_si256((const __m256i *)(less + 8 * b)));
        }
    }
    return p;
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, NAME(pair_scales) w,
                             NAME(pair_scales) x) {
    for (int b = 0; b < 2; b++)
        sums.q[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p.q[b]), _mm256_mul_ps(w.q[b], x.q[b]),
                                    sums.q[b]);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    return sum_of_8(_mm256_add_ps(sums.q[0], sums.q[1]));
}

typedef __m256 NAME(lanes_8bit);
typedef __m256i NAME(row_8bit);
#define GROUP_8BIT 32
#define HALVES_8BIT 2
#define TILE_ROWS_8BIT 2
#define TILE_TOKENS_8BIT 4
INLINE __m256 NAME(zero_8bit)(void) { return _mm256_setzero_ps(); }
INLINE __m256i NAME(load_row_8bit)(const uint8_t *w) {
    return _mm256_load_si256((const __m256i *)w);
}
INLINE __m256 NAME(fma_8bit)(int format, __m256i w, const uint8_t *x, const float *scale,
                             __m256 sum) {
    const __m256i one = _mm256_set1_epi16(1);
    double two;
    __m256i q = _mm256_load_si256((const __m256i *)x), p;
    if (SIGNED(number_formats[format].zero))
        p = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w)), one);
    else
        p = _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(w, q), one),
                             _mm256_load_si256((const __m256i *)(x + 32)));
    if (scales_of_32(format) == 1)
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), _mm256_broadcast_ss(scale), sum);
    memcpy(&two, scale, sizeof two);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), _mm256_castpd_ps(_mm256_set1_pd(two)), sum);
}
INLINE void NAME(multiply_8bit)(const float *w, const float *x, float *to) {
    _mm256_store_ps(to, _mm256_mul_ps(_mm256_load_ps(w), _mm256_load_ps(x)));
}
/* Fours of a block's two groups in turn, where it has two. */
INLINE void NAME(spread)(int format, const void *from, uint8_t *to, int64_t apart) {
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    for (int g = 0; g < 2; g++) {
        __m256i q = _mm256_loadu_si256((const __m256i *)((const uint8_t *)from + 32 * g));
        if (scales_of_32(format) == 2) q = _mm256_permutevar8x32_epi32(q, order);
        _mm256_store_si256((__m256i *)(to + g * apart), q);
    }
}
INLINE void NAME(store_8bit)(int format, float *to, __m256 sum) {
    const __m256i order = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    _mm256_store_ps(to, scales_of_32(format) == 2 ? _mm256_permutevar8x32_ps(sum, order) : sum);
}

#elif defined(UNIT_NEON)

typedef struct { float32x4_t q[4]; } NAME(lanes);
typedef struct { int32x4_t q[4]; } NAME(ints);
typedef NAME(ints) NAME(weights);
typedef struct { float q[4]; } NAME(pair_scales); /* of 16 values each */
#define ROW_BLOCK_8BIT 1

INLINE NAME(pair_scales) NAME(two)(float first, float second) {
    return (NAME(pair_scales)){{first, first, second, second}};
}
INLINE NAME(pair_scales) NAME(pair)(int format, const float *s) {
    if (scales_of_32(format) == 1) return NAME(two)(s[0], s[1]);
    return (NAME(pair_scales)){{s[0], s[1], s[2], s[3]}};
}
INLINE NAME(lanes) NAME(no_lanes)(void) {
    float32x4_t zero = vdupq_n_f32(0);
    return (NAME(lanes)){{zero, zero, zero, zero}};
}
INLINE NAME(weights) NAME(quants_q8_0)(const uint8_t *block, int part) {
    (void)part;
    NAME(weights) w;
    for (int b = 0; b < 2; b++, block += bytes_of_32(Q8_0))
        for (int i = 0; i < 2; i++)
            w.q[2 * b + i] = vreinterpretq_s32_s8(vld1q_s8((const int8_t *)block + 2 + 16 * i));
    return w;
}
INLINE NAME(weights) NAME(quants_q4_0)(const uint8_t *block, int part) {
    (void)part;
    NAME(weights) w;
    for (int b = 0; b < 2; b++, block += bytes_of_32(Q4_0)) {
        uint8x16_t packed = vld1q_u8(block + 2);
        int8x16_t eight = vdupq_n_s8(8);
        w.q[2 * b] = vreinterpretq_s32_s8(
            vsubq_s8(vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))), eight));
        w.q[2 * b + 1] =
            vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), eight));
    }
    return w;
}
INLINE int32x4_t NAME(fours)(int8x16_t w, int8x16_t x) { /* sums of four products */
#if defined(UNIT_DOTPROD)
    return vdotq_s32(vdupq_n_s32(0), w, x);
#else
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    int16x8_t high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
INLINE NAME(ints) NAME(products)(int format, NAME(weights) w, const int8_t *q, const int32_t *less) {
    (void)format, (void)less;
    for (int i = 0; i < 4; i++)
        w.q[i] = NAME(fours)(vreinterpretq_s8_s32(w.q[i]), vld1q_s8(q + 16 * i));
    return w;
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, NAME(pair_scales) w,
                             NAME(pair_scales) x) {
    for (int i = 0; i < 4; i++)
        sums.q[i] = vfmaq_n_f32(sums.q[i], vcvtq_f32_s32(p.q[i]), w.q[i] * x.q[i]);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    float32x4_t s = vaddq_f32(vaddq_f32(sums.q[0], sums.q[2]), vaddq_f32(sums.q[1], sums.q[3]));
    float32x2_t h = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}

typedef float32x4_t NAME(lanes_8bit);
typedef int8x16_t NAME(row_8bit);
#define GROUP_8BIT 16
#define HALVES_8BIT 2
#define TILE_ROWS_8BIT 4
#define TILE_TOKENS_8BIT 4
INLINE float32x4_t NAME(zero_8bit)(void) { return vdupq_n_f32(0); }
INLINE int8x16_t NAME(load_row_8bit)(const uint8_t *w) { return vld1q_s8((const int8_t *)w); }
INLINE float32x4_t NAME(fma_8bit)(int format, int8x16_t w, const uint8_t *x, const float *scale,
                                  float32x4_t sum) {
    int32x4_t p = NAME(fours)(w, vld1q_s8((const int8_t *)x));
    (void)format;
    return vfmaq_f32(sum, vcvtq_f32_s32(p), vld1q_dup_f32(scale));
}
INLINE void NAME(multiply_8bit)(const float *w, const float *x, float *to) {
    for (int i = 0; i < 8; i += 4) vst1q_f32(to + i, vmulq_f32(vld1q_f32(w + i), vld1q_f32(x + i)));
}
INLINE void NAME(store_8bit)(int format, float *to, float32x4_t sum) {
    (void)format;
    vst1q_f32(to, sum);
}

#else /* plain C */

typedef struct { float q[16]; } NAME(lanes);
typedef struct { int32_t q[16]; } NAME(ints);
typedef struct { int8_t q[2 * BLOCK]; } NAME(weights);
typedef struct { float q[4]; } NAME(pair_scales); /* of 16 values each */
#define ROW_BLOCK_8BIT 1

INLINE NAME(pair_scales) NAME(two)(float first, float second) {
    return (NAME(pair_scales)){{first, first, second, second}};
}
INLINE NAME(pair_scales) NAME(pair)(int format, const float *s) {
    if (scales_of_32(format) == 1) return NAME(two)(s[0], s[1]);
    return (NAME(pair_scales)){{s[0], s[1], s[2], s[3]}};
}
INLINE NAME(lanes) NAME(no_lanes)(void) { return (NAME(lanes)){{0}}; }
INLINE NAME(ints) NAME(products)(int format, NAME(weights) w, const int8_t *q, const int32_t *less) {
    NAME(ints) p = {{0}};
    (void)format, (void)less;
    for (int i = 0; i < 2 * BLOCK; i++) p.q[i / 4] += w.q[i] * q[i];
    return p;
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, NAME(pair_scales) w,
                             NAME(pair_scales) x) {
    for (int i = 0; i < 16; i++)
        sums.q[i] = __builtin_fmaf((float)p.q[i], w.q[i / 4] * x.q[i / 4], sums.q[i]);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) sums.q[i] += sums.q[i + n];
    return sums.q[0];
}

typedef NAME(lanes) NAME(lanes_8bit);
typedef NAME(weights) NAME(row_8bit);
#define GROUP_8BIT 64
#define HALVES_8BIT 1
#define TILE_ROWS_8BIT 1
#define TILE_TOKENS_8BIT 4
INLINE NAME(lanes) NAME(zero_8bit)(void) { return NAME(no_lanes)(); }
INLINE NAME(weights) NAME(load_row_8bit)(const uint8_t *w) {
    NAME(weights) row;
    memcpy(&row, w, sizeof row);
    return row;
}
INLINE NAME(lanes) NAME(fma_8bit)(int format, NAME(weights) w, const uint8_t *x,
                                  const float *scales, NAME(lanes) sum) {
    return NAME(add)(sum, NAME(products)(format, w, (const int8_t *)x, NULL),
                     NAME(pair)(format, scales), NAME(two)(1, 1));
}
INLINE void NAME(multiply_8bit)(const float *w, const float *x, float *to) {
    for (int i = 0; i < 16; i++) to[i] = w[i] * x[i];
}
INLINE void NAME(store_8bit)(int format, float *to, NAME(lanes) sum) {
    (void)format;
    memcpy(to, sum.q, sizeof sum.q);
}

#endif

#if !defined(UNIT_AVX512) && !defined(UNIT_AVX2)
/* 16 times 4 bytes to their groups of lanes, which lie `apart` bytes from each other. */
INLINE void NAME(spread)(int format, const void *from, uint8_t *to, int64_t apart) {
    (void)format;
    for (int g = 0; g < 64 / GROUP_8BIT; g++)
        memcpy(to + g * apart, (const uint8_t *)from + g * GROUP_8BIT, GROUP_8BIT);
}
#endif

#if !defined(UNIT_VNNI)
/* The scales of two blocks, which are float16. */
INLINE NAME(pair_scales) NAME(two_halves)(const uint8_t *first, const uint8_t *second) {
    return NAME(two)(NAME(half)(first), NAME(half)(second));
}
/* The same of mxfp4, which are powers of two. */
INLINE NAME(pair_scales) NAME(two_powers)(const uint8_t *first, const uint8_t *second) {
    float scales[2];
    NAME(scales_mxfp4)(first, scales, NULL), NAME(scales_mxfp4)(second, scales + 1, NULL);
    return NAME(two)(scales[0], scales[1]);
}
#endif

/* Where a unit has no quants_ of its own. */
#if defined(UNIT_AVX2)
#define PORTABLE_QUANTS(code, name) \
    INLINE NAME(weights) NAME(quants_##name)(const uint8_t *block, int part) { \
        return NAME(stored)(two_##name(block, part), number_formats[code].zero); \
    }
#else
#define PORTABLE_QUANTS(code, name) \
    static __attribute__((noinline)) NAME(weights) NAME(quants_##name)(const uint8_t *block, \
                                                                      int part) { \
        const int next = number_formats[code].block == BLOCK ? number_formats[code].bytes : 0; \
        int8_t q[2 * BLOCK]; \
        NAME(weights) w; \
        unpack_##name(block, part, q); \
        unpack_##name(block + next, part + 1, q + BLOCK); \
        memcpy(&w, q, sizeof w); \
        return w; \
    }
#endif

#if defined(UNIT_PLAIN)
PORTABLE_QUANTS(Q8_0, q8_0)
PORTABLE_QUANTS(Q4_0, q4_0)
#endif
#if !defined(UNIT_VNNI)
PORTABLE_QUANTS(Q4_1, q4_1)
PORTABLE_QUANTS(Q5_0, q5_0)
PORTABLE_QUANTS(Q5_1, q5_1)
PORTABLE_QUANTS(Q2_K, q2_K)
PORTABLE_QUANTS(Q3_K, q3_K)
PORTABLE_QUANTS(Q4_K, q4_K)
PORTABLE_QUANTS(Q5_K, q5_K)
PORTABLE_QUANTS(Q6_K, q6_K)
PORTABLE_QUANTS(IQ4_NL, iq4_nl)
PORTABLE_QUANTS(IQ4_XS, iq4_xs)
PORTABLE_QUANTS(TQ1_0, tq1_0)
PORTABLE_QUANTS(TQ2_0, tq2_0)
PORTABLE_QUANTS(MXFP4, mxfp4)
#endif
#undef PORTABLE_QUANTS
