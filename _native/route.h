/* A mixture's router: which experts a token uses, and how much each counts. */
#pragma once

#include "functions.h"

/* What an expert whose logit is NaN is chosen by, and the least that any other is chosen by. Sums
 * of two keep the order: two numbers, then a number and a NaN, then two NaN. (Also in
 * flashinfer/kernels/neuron_cache.py.) */
#define VALUE_OF_NAN (-2e38f)
#define LEAST_VALUE (-1e38f)

typedef struct {
    int64_t experts, per_token, groups, groups_kept; /* a group has experts / groups */
    int normalised; /* weights are divided by their sum */
    int sigmoid;    /* an expert's score is the sigmoid of its logit, else its share of a softmax */
    int by_max;     /* a group's score is its largest value, else the sum of its two largest */
    const float *choice_bias; /* (experts,), added to the scores to choose by, or NULL */
    float scale;              /* multiplies the weights */
} routing;

/* Memory for one token at a time, used where chosen_by_logits() is false. */
typedef struct {
    float *values, *group_scores; /* (experts,), (groups,) */
    int32_t *kept;                /* (groups_kept,) */
} routing_scratch;

/* A NaN is below all others. */
INLINE float routed(float logit) { return logit == logit ? logit : -INFINITY; }

/* Without bias and groups, experts are chosen by their logits, which are in the order of the
 * softmax and do not round to equal ones as it may. */
INLINE int chosen_by_logits(const routing *r) {
    return !r->sigmoid && !r->choice_bias && r->groups_kept == r->groups;
}

/* Add `id` to the `n` chosen so far, if it is among the best `most`; return the new n. The best
 * come first, of equal ones those added first. An insertion, as `most` is small. */
INLINE int64_t choose(const float *values, int64_t id, int64_t most, int32_t *chosen, int64_t n) {
    float value = routed(values[id]);
    int64_t at = n < most ? n++ : most;
    while (at > 0 && routed(values[chosen[at - 1]]) < value) {
        if (at < n) chosen[at] = chosen[at - 1];
        at--;
    }
    if (at < n) chosen[at] = (int32_t)id;
    return n;
}

INLINE void sort_ids(int32_t *ids, int64_t n) {
    for (int64_t i = 1; i < n; i++) {
        int32_t id = ids[i];
        int64_t at = i;
        for (; at > 0 && ids[at - 1] > id; at--) ids[at] = ids[at - 1];
        ids[at] = id;
    }
}

/* logits (experts,) -> values (experts,) to choose by: scores plus choice_bias. `largest` logit and
 * `total` are the softmax's. */
static void choice_values(const routing *r, const float *logits, float largest, float total,
                          float *values) {
    for (int64_t e = 0; e < r->experts; e++) {
        float logit = routed(logits[e]);
        float value = r->sigmoid ? sigmoid_f32(logit) : exp_f32(logit - largest) / total;
        if (r->choice_bias) value += r->choice_bias[e];
        if (!(value > LEAST_VALUE)) value = LEAST_VALUE; /* of NaN, too, which a bias may give */
        values[e] = logits[e] == logits[e] ? value : VALUE_OF_NAN;
    }
}

/* The score of a group of n experts, from their values. */
static float group_score(const float *values, int64_t n, int by_max) {
    float first = values[0], second = -INFINITY;
    for (int64_t e = 1; e < n; e++) {
        if (values[e] > first) {
            second = first;
            first = values[e];
        } else if (values[e] > second) {
            second = values[e];
        }
    }
    return by_max || n == 1 ? first : first + second;
}

/* The experts of the largest values in the groups of the highest scores. */
static void choose_from_groups(const routing *r, const routing_scratch *scratch, int32_t *chosen) {
    int64_t size = r->experts / r->groups;
    for (int64_t g = 0, n = 0; g < r->groups; g++) {
        scratch->group_scores[g] = group_score(scratch->values + g * size, size, r->by_max);
        n = choose(scratch->group_scores, g, r->groups_kept, scratch->kept, n);
    }
    sort_ids(scratch->kept, r->groups_kept);
    for (int64_t i = 0, n = 0; i < r->groups_kept; i++) {
        int64_t begin = scratch->kept[i] * size;
        for (int64_t e = begin; e < begin + size; e++)
            n = choose(scratch->values, e, r->per_token, chosen, n);
    }
}

/* The weights (per_token,) of the experts that were chosen. */
static void weigh(const routing *r, const float *logits, float largest, float total,
                  const int32_t *chosen, float *weights) {
    float sum = 0.0f, divisor = r->sigmoid ? 1.0f : total;
    for (int64_t i = 0; i < r->per_token; i++) {
        float logit = routed(logits[chosen[i]]);
        weights[i] = r->sigmoid ? sigmoid_f32(logit) : exp_f32(logit - largest);
        sum += weights[i];
    }
    if (r->normalised) { /* as in transformers: plus 1e-20, or at least 1e-12 of the softmax */
        float least = 1e-12f * total;
        divisor = r->sigmoid ? sum + 1e-20f : sum < least ? least : sum;
    }
    for (int64_t i = 0; i < r->per_token; i++) weights[i] = weights[i] / divisor * r->scale;
}

/* logits (experts,) -> chosen (per_token,) ascending, weights (per_token,). */
static void route_token(const routing *r, const float *logits, const routing_scratch *scratch,
                        int32_t *chosen, float *weights) {
    int by_logits = chosen_by_logits(r);
    float largest = -INFINITY, total = 0.0f;
    if (by_logits) {
        for (int64_t e = 0, n = 0; e < r->experts; e++)
            n = choose(logits, e, r->per_token, chosen, n);
        largest = routed(logits[chosen[0]]);
    } else {
        for (int64_t e = 0; e < r->experts; e++)
            if (logits[e] > largest) largest = logits[e];
    }
    /* The largest logit is among those chosen by logits, whose sum then needs no least value. */
    if (!r->sigmoid && !(by_logits && r->normalised))
        for (int64_t e = 0; e < r->experts; e++) total += exp_f32(routed(logits[e]) - largest);
    if (!by_logits) {
        choice_values(r, logits, largest, total, scratch->values);
        choose_from_groups(r, scratch, chosen);
    }
    sort_ids(chosen, r->per_token);
    weigh(r, logits, largest, total, chosen, weights);
}
