/* Products of GGML's blocks with activations of 8 bits. Included once a unit by kernels.h.
 *
 * Two blocks at a time: 16 whole numbers, each the sum of four products, times the two blocks'
 * scales, are added to 16 float32 lanes. The whole numbers are exact, and every unit adds the same
 * lanes in the same order: the same bits.
 */

#if defined(UNIT_VNNI)

typedef struct { __m512 q; } NAME(lanes);
typedef struct { __m512i q; } NAME(ints);

INLINE NAME(lanes) NAME(no_lanes)(void) { return (NAME(lanes)){_mm512_setzero_ps()}; }
INLINE NAME(ints) NAME(products)(int format, const uint8_t *block, const int8_t *q, const int32_t *fours) {
    __m512i x = _mm512_loadu_si512(q), sums = _mm512_loadu_si512(fours);
    if (format == Q8_0) { /* unsigned w + 128, so 128 x is taken away */
        __m512i w = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(block + 2))),
            _mm256_loadu_si256((const __m256i *)(block + Q8_0_BYTES + 2)), 1);
        __m512i less = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
        w = _mm512_xor_si512(w, _mm512_set1_epi8((char)128));
        return (NAME(ints)){_mm512_dpbusd_epi32(less, w, x)};
    }
    __m256i packed = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(block + Q4_0_BYTES + 2)),
                                      _mm_loadu_si128((const __m128i *)(block + 2)));
    __m256i low = _mm256_set1_epi8(15);
    __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low)),
                                   _mm256_and_si256(_mm256_srli_epi16(packed, 4), low), 1);
    w = _mm512_shuffle_i64x2(w, w, 0xd8); /* halves of block 0, then of block 1 */
    __m512i less = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 3));
    return (NAME(ints)){_mm512_dpbusd_epi32(less, w, x)};
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, float scale0, float scale1) {
    __m512 scales = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scale0), _mm512_set1_ps(scale1));
    return (NAME(lanes)){_mm512_fmadd_ps(_mm512_cvtepi32_ps(p.q), scales, sums.q)};
}
INLINE float NAME(total)(NAME(lanes) sums) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums.q), 1));
    return sum_of_8(_mm256_add_ps(_mm512_castps512_ps256(sums.q), high));
}
#define SCALE hardware_scale

#elif defined(UNIT_AVX512) || defined(UNIT_AVX2)

typedef struct { __m256 q[2]; } NAME(lanes);
typedef struct { __m256i q[2]; } NAME(ints);

INLINE NAME(lanes) NAME(no_lanes)(void) {
    return (NAME(lanes)){{_mm256_setzero_ps(), _mm256_setzero_ps()}};
}
INLINE __m256i NAME(block_products)(int format, const uint8_t *block, const int8_t *q, const int32_t *fours) {
    __m256i x = _mm256_loadu_si256((const __m256i *)q), one = _mm256_set1_epi16(1);
    if (format == Q8_0) { /* |w| times x with w's sign: pairs stay within 16 bits */
        __m256i w = _mm256_loadu_si256((const __m256i *)(block + 2));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_madd_epi16(pairs, one);
    }
    __m128i packed = _mm_loadu_si128((const __m128i *)(block + 2)), low = _mm_set1_epi8(15);
    __m256i w = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(packed, 4), low),
                                 _mm_and_si128(packed, low));
    __m256i sums = _mm256_loadu_si256((const __m256i *)fours);
    return _mm256_sub_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(w, x), one),
                            _mm256_slli_epi32(sums, 3));
}
INLINE NAME(ints) NAME(products)(int format, const uint8_t *block, const int8_t *q, const int32_t *fours) {
    int64_t size = format == Q8_0 ? Q8_0_BYTES : Q4_0_BYTES;
    return (NAME(ints)){{NAME(block_products)(format, block, q, fours),
                         NAME(block_products)(format, block + size, q + BLOCK, fours + 8)}};
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, float scale0, float scale1) {
    sums.q[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p.q[0]), _mm256_set1_ps(scale0), sums.q[0]);
    sums.q[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p.q[1]), _mm256_set1_ps(scale1), sums.q[1]);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    return sum_of_8(_mm256_add_ps(sums.q[0], sums.q[1]));
}
#define SCALE hardware_scale

#elif defined(UNIT_NEON)

typedef struct { float32x4_t q[4]; } NAME(lanes);
typedef struct { int32x4_t q[4]; } NAME(ints);

INLINE NAME(lanes) NAME(no_lanes)(void) {
    float32x4_t zero = vdupq_n_f32(0);
    return (NAME(lanes)){{zero, zero, zero, zero}};
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
INLINE NAME(ints) NAME(products)(int format, const uint8_t *block, const int8_t *q, const int32_t *fours) {
    NAME(ints) p;
    (void)fours;
    for (int b = 0; b < 2; b++) {
        int8x16_t w[2];
        if (format == Q8_0) {
            const int8_t *values = (const int8_t *)block + b * Q8_0_BYTES + 2;
            w[0] = vld1q_s8(values), w[1] = vld1q_s8(values + 16);
        } else {
            uint8x16_t packed = vld1q_u8(block + b * Q4_0_BYTES + 2);
            int8x16_t eight = vdupq_n_s8(8);
            w[0] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))), eight);
            w[1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), eight);
        }
        for (int i = 0; i < 2; i++)
            p.q[2 * b + i] = NAME(fours)(w[i], vld1q_s8(q + 32 * b + 16 * i));
    }
    return p;
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, float scale0, float scale1) {
    for (int i = 0; i < 4; i++)
        sums.q[i] = vfmaq_n_f32(sums.q[i], vcvtq_f32_s32(p.q[i]), i < 2 ? scale0 : scale1);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    float32x4_t s = vaddq_f32(vaddq_f32(sums.q[0], sums.q[2]), vaddq_f32(sums.q[1], sums.q[3]));
    float32x2_t h = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}
#define SCALE block_scale

#else /* plain C */

typedef struct { float q[16]; } NAME(lanes);
typedef struct { int32_t q[16]; } NAME(ints);

INLINE NAME(lanes) NAME(no_lanes)(void) { return (NAME(lanes)){{0}}; }
INLINE NAME(ints) NAME(products)(int format, const uint8_t *block, const int8_t *q, const int32_t *fours) {
    NAME(ints) p = {{0}};
    (void)fours;
    for (int i = 0; i < 2 * BLOCK; i++) {
        const uint8_t *values = block + i / BLOCK * (format == Q8_0 ? Q8_0_BYTES : Q4_0_BYTES) + 2;
        int j = i % BLOCK;
        int w = format == Q8_0 ? (int8_t)values[j] : (j < 16 ? values[j] & 15 : values[j - 16] >> 4) - 8;
        p.q[i / 4] += w * q[i];
    }
    return p;
}
INLINE NAME(lanes) NAME(add)(NAME(lanes) sums, NAME(ints) p, float scale0, float scale1) {
    for (int i = 0; i < 16; i++)
        sums.q[i] = __builtin_fmaf((float)p.q[i], i < 8 ? scale0 : scale1, sums.q[i]);
    return sums;
}
INLINE float NAME(total)(NAME(lanes) sums) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) sums.q[i] += sums.q[i + n];
    return sums.q[0];
}
#define SCALE block_scale

#endif

/* A row of blocks . the activations of one token; `coming` is fetched meanwhile. */
INLINE float NAME(dot_blocks)(int format, const uint8_t *row, const uint8_t *coming,
                              const activations *x, int64_t token) {
    int64_t size = format == Q8_0 ? Q8_0_BYTES : Q4_0_BYTES, blocks = x->d / BLOCK, b = 0;
    const int8_t *q = x->q + token * x->d;
    const int32_t *fours = x->fours + token * x->d / 4;
    const float *scales = x->scales + token * blocks;
    NAME(lanes) sums = NAME(no_lanes)();
    for (; b + 2 <= blocks; b += 2) {
        const uint8_t *block = row + b * size;
        __builtin_prefetch(coming + b * size, 0, 2);
        __builtin_prefetch(coming + (b + 1) * size, 0, 2);
        NAME(ints) p = NAME(products)(format, block, q + b * BLOCK, fours + b * 8);
        sums = NAME(add)(sums, p, SCALE(block) * scales[b], SCALE(block + size) * scales[b + 1]);
    }
    if (b < blocks) { /* the last one by itself, and zeros beside it */
        uint8_t padded[2 * Q8_0_BYTES] = {0};
        int8_t last[2 * BLOCK] = {0};
        int32_t its[16] = {0};
        memcpy(padded, row + b * size, size);
        memcpy(last, q + b * BLOCK, BLOCK);
        memcpy(its, fours + b * 8, 32);
        NAME(ints) p = NAME(products)(format, padded, last, its);
        sums = NAME(add)(sums, p, SCALE(padded) * scales[b], 0.0f);
    }
    return NAME(total)(sums);
}

#undef SCALE
