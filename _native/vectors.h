/* 32 float32 lanes, on whatever vector unit UNIT_* names. Included once a unit by kernels.h.
 *
 * Every unit does the same operations on the same 32 lanes in the same order, fused
 * multiply-adds included, so all units give the same bits.
 */

#if defined(UNIT_AVX512)

typedef struct { __m512 q[2]; } NAME(v32);
#define V NAME(v32)
#define EACH for (int i = 0; i < 2; i++)
#define ROW_BLOCK 3 /* rows that share a loading of the tokens, as the registers allow */

INLINE V NAME(set)(float value) { V v; EACH v.q[i] = _mm512_set1_ps(value); return v; }
INLINE V NAME(load_f32)(const float *p) { V v; EACH v.q[i] = _mm512_loadu_ps(p + 16 * i); return v; }
INLINE void NAME(store)(float *p, V v) { EACH _mm512_storeu_ps(p + 16 * i, v.q[i]); }
INLINE V NAME(fma)(V x, V y, V z) { EACH z.q[i] = _mm512_fmadd_ps(x.q[i], y.q[i], z.q[i]); return z; }
INLINE V NAME(load_f16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 16 * i)));
    return v;
}
INLINE V NAME(load_bf16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 16 * i))), 16));
    return v;
}
INLINE V NAME(scaled)(const __m128i *quants, float scale) { /* 32 int8 */
    V v;
    EACH v.q[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quants[i])),
                                _mm512_set1_ps(scale));
    return v;
}
INLINE float NAME(sum)(V v) {
    __m512 s = _mm512_add_ps(v.q[0], v.q[1]);
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
    return sum_of_8(h);
}

typedef __m512 NAME(lane_group); /* as many of the 32 as a register holds */
#define LANES 16
#define DOWN_TILE_COLUMNS 64
#define TILE_ROWS 4 /* as the registers allow, see tiles.h */
#define TILE_TOKENS 6
INLINE __m512 NAME(lanes_of)(V v, int group) { return v.q[group]; }
INLINE __m512 NAME(set_lanes)(float value) { return _mm512_set1_ps(value); }
INLINE __m512 NAME(load_lanes)(const float *p) { return _mm512_loadu_ps(p); }
INLINE void NAME(store_lanes)(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
INLINE __m512 NAME(fma_lanes)(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }

#elif defined(UNIT_AVX2)

typedef struct { __m256 q[4]; } NAME(v32);
#define V NAME(v32)
#define EACH for (int i = 0; i < 4; i++)
#define ROW_BLOCK 1

INLINE V NAME(set)(float value) { V v; EACH v.q[i] = _mm256_set1_ps(value); return v; }
INLINE V NAME(load_f32)(const float *p) { V v; EACH v.q[i] = _mm256_loadu_ps(p + 8 * i); return v; }
INLINE void NAME(store)(float *p, V v) { EACH _mm256_storeu_ps(p + 8 * i, v.q[i]); }
INLINE V NAME(fma)(V x, V y, V z) { EACH z.q[i] = _mm256_fmadd_ps(x.q[i], y.q[i], z.q[i]); return z; }
INLINE V NAME(load_f16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
    return v;
}
INLINE V NAME(load_bf16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i))), 16));
    return v;
}
INLINE V NAME(scaled)(const __m128i *quants, float scale) { /* 32 int8 */
    V v;
    EACH {
        __m128i part = i % 2 ? _mm_srli_si128(quants[i / 2], 8) : quants[i / 2];
        v.q[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)), _mm256_set1_ps(scale));
    }
    return v;
}
INLINE float NAME(sum)(V v) {
    return sum_of_8(_mm256_add_ps(_mm256_add_ps(v.q[0], v.q[2]), _mm256_add_ps(v.q[1], v.q[3])));
}

typedef __m256 NAME(lane_group); /* as many of the 32 as a register holds */
#define LANES 8
#define DOWN_TILE_COLUMNS 16
#define TILE_ROWS 3 /* as the registers allow, see tiles.h */
#define TILE_TOKENS 4
INLINE __m256 NAME(lanes_of)(V v, int group) { return v.q[group]; }
INLINE __m256 NAME(set_lanes)(float value) { return _mm256_set1_ps(value); }
INLINE __m256 NAME(load_lanes)(const float *p) { return _mm256_loadu_ps(p); }
INLINE void NAME(store_lanes)(float *p, __m256 v) { _mm256_storeu_ps(p, v); }
INLINE __m256 NAME(fma_lanes)(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }

#elif defined(UNIT_NEON)

typedef struct { float32x4_t q[8]; } NAME(v32);
#define V NAME(v32)
#define EACH for (int i = 0; i < 8; i++)
#define ROW_BLOCK 1

INLINE V NAME(set)(float value) { V v; EACH v.q[i] = vdupq_n_f32(value); return v; }
INLINE V NAME(load_f32)(const float *p) { V v; EACH v.q[i] = vld1q_f32(p + 4 * i); return v; }
INLINE void NAME(store)(float *p, V v) { EACH vst1q_f32(p + 4 * i, v.q[i]); }
INLINE V NAME(fma)(V x, V y, V z) { EACH z.q[i] = vfmaq_f32(z.q[i], x.q[i], y.q[i]); return z; }
INLINE V NAME(load_f16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return v;
}
INLINE V NAME(load_bf16)(const uint16_t *p) {
    V v;
    EACH v.q[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return v;
}
INLINE V NAME(scaled)(const int8x16_t *quants, float scale) { /* 32 int8 */
    V v;
    for (int i = 0; i < 2; i++) {
        int16x8_t low = vmovl_s8(vget_low_s8(quants[i])), high = vmovl_s8(vget_high_s8(quants[i]));
        v.q[4 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
        v.q[4 * i + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
        v.q[4 * i + 2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
        v.q[4 * i + 3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
    }
    EACH v.q[i] = vmulq_n_f32(v.q[i], scale);
    return v;
}
INLINE V NAME(load_q8_0)(const uint8_t *row, int64_t b) {
    const uint8_t *block = row + b * bytes_of_32(Q8_0);
    int8x16_t q[2] = {vld1q_s8((const int8_t *)block + 2), vld1q_s8((const int8_t *)block + 18)};
    return NAME(scaled)(q, half_at(block));
}
INLINE V NAME(load_q4_0)(const uint8_t *row, int64_t b) {
    const uint8_t *block = row + b * bytes_of_32(Q4_0);
    uint8x16_t packed = vld1q_u8(block + 2);
    int8x16_t eight = vdupq_n_s8(8);
    int8x16_t q[2] = {vsubq_s8(vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))), eight),
                      vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), eight)};
    return NAME(scaled)(q, half_at(block));
}
INLINE float NAME(sum)(V v) {
    for (int i = 0; i < 4; i++) v.q[i] = vaddq_f32(v.q[i], v.q[i + 4]);
    for (int i = 0; i < 2; i++) v.q[i] = vaddq_f32(v.q[i], v.q[i + 2]);
    float32x4_t s = vaddq_f32(v.q[0], v.q[1]);
    float32x2_t h = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}

typedef float32x4_t NAME(lane_group); /* as many of the 32 as a register holds */
#define LANES 4
#define DOWN_TILE_COLUMNS 16
#define TILE_ROWS 4 /* as the registers allow, see tiles.h */
#define TILE_TOKENS 6
INLINE float32x4_t NAME(lanes_of)(V v, int group) { return v.q[group]; }
INLINE float32x4_t NAME(set_lanes)(float value) { return vdupq_n_f32(value); }
INLINE float32x4_t NAME(load_lanes)(const float *p) { return vld1q_f32(p); }
INLINE void NAME(store_lanes)(float *p, float32x4_t v) { vst1q_f32(p, v); }
INLINE float32x4_t NAME(fma_lanes)(float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }

#else /* plain C */

typedef struct { float q[32]; } NAME(v32);
#define V NAME(v32)
#define EACH for (int i = 0; i < 32; i++)
#define ROW_BLOCK 1

INLINE V NAME(set)(float value) { V v; EACH v.q[i] = value; return v; }
INLINE V NAME(load_f32)(const float *p) { V v; memcpy(v.q, p, sizeof v.q); return v; }
INLINE void NAME(store)(float *p, V v) { EACH p[i] = v.q[i]; }
INLINE V NAME(fma)(V x, V y, V z) { EACH z.q[i] = __builtin_fmaf(x.q[i], y.q[i], z.q[i]); return z; }
INLINE V NAME(load_f16)(const uint16_t *p) { /* rows may begin at any byte */
    V v;
    uint16_t halves[32];
    memcpy(halves, p, sizeof halves);
    EACH v.q[i] = f16_to_f32(halves[i]);
    return v;
}
INLINE V NAME(load_bf16)(const uint16_t *p) {
    V v;
    uint16_t halves[32];
    memcpy(halves, p, sizeof halves);
    EACH v.q[i] = float_of_bits((uint32_t)halves[i] << 16);
    return v;
}
#define LOAD(code, name) \
    INLINE V NAME(load_##name)(const uint8_t *row, int64_t b) { \
        const uint8_t *block = row + b * bytes_of_32(code); \
        V v; \
        int8_t q[BLOCK]; \
        unpack_##name(block, 0, q); \
        EACH v.q[i] = half_at(block) * q[i]; \
        return v; \
    }
LOAD(Q8_0, q8_0)
LOAD(Q4_0, q4_0)
#undef LOAD
INLINE float NAME(sum)(V v) {
    for (int n = 16; n; n /= 2)
        for (int i = 0; i < n; i++) v.q[i] += v.q[i + n];
    return v.q[0];
}

typedef V NAME(lane_group);
#define LANES 32
#define DOWN_TILE_COLUMNS 32
#define TILE_ROWS 1
#define TILE_TOKENS 4
INLINE V NAME(lanes_of)(V v, int group) { (void)group; return v; }
INLINE V NAME(set_lanes)(float value) { return NAME(set)(value); }
INLINE V NAME(load_lanes)(const float *p) { return NAME(load_f32)(p); }
INLINE void NAME(store_lanes)(float *p, V v) { NAME(store)(p, v); }
INLINE V NAME(fma_lanes)(V x, V y, V z) { return NAME(fma)(x, y, z); }

#endif

#if defined(UNIT_AVX512) || defined(UNIT_AVX2)

INLINE V NAME(load_q8_0)(const uint8_t *row, int64_t b) {
    const uint8_t *block = row + b * bytes_of_32(Q8_0);
    __m128i q[2] = {_mm_loadu_si128((const __m128i *)(block + 2)),
                    _mm_loadu_si128((const __m128i *)(block + 18))};
    return NAME(scaled)(q, f16c_half(block));
}
#if defined(UNIT_AVX512)
INLINE V NAME(load_q4_0)(const uint8_t *row, int64_t b) {
    const uint8_t *block = row + b * bytes_of_32(Q4_0);
    const __m512 values =
        _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    __m512i packed = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(block + 2)));
    __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(f16c_half(block)));
    return (V){{_mm512_permutexvar_ps(packed, scaled),
                _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), scaled)}};
}
#else
INLINE V NAME(load_q4_0)(const uint8_t *row, int64_t b) {
    const uint8_t *block = row + b * bytes_of_32(Q4_0);
    __m128i packed = _mm_loadu_si128((const __m128i *)(block + 2));
    __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i q[2] = {_mm_sub_epi8(_mm_and_si128(packed, low), eight),
                    _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), low), eight)};
    return NAME(scaled)(q, f16c_half(block));
}
#endif

#endif
