/* A mixture's router: which experts a token uses, and how much each counts. */
#pragma once

#include "functions.h"

/* A NaN is below all others. */
INLINE float routed(float logit) { return logit == logit ? logit : -INFINITY; }

/* Of logits (experts,) the `per_token` largest, of equal ones the lowest ids; ascending. Their
 * weights are a softmax over all of them or, where `normalised`, over those chosen. */
static void route_token(const float *logits, int64_t experts, int64_t per_token, int normalised,
                        int32_t *chosen, float *weights) {
    /* Chosen so far, the best first: an insertion, as per_token is small. */
    for (int64_t e = 0, n = 0; e < experts; e++) {
        float logit = routed(logits[e]);
        int64_t at = n < per_token ? n++ : per_token;
        while (at > 0 && routed(logits[chosen[at - 1]]) < logit) {
            if (at < n) chosen[at] = chosen[at - 1];
            at--;
        }
        if (at < n) chosen[at] = (int32_t)e;
    }
    float largest = routed(logits[chosen[0]]), total = 0.0f;
    for (int64_t i = 1; i < per_token; i++) { /* by their ids */
        int32_t expert = chosen[i];
        int64_t at = i;
        for (; at > 0 && chosen[at - 1] > expert; at--) chosen[at] = chosen[at - 1];
        chosen[at] = expert;
    }
    for (int64_t i = 0; i < per_token; i++) {
        weights[i] = exp_f32(routed(logits[chosen[i]]) - largest);
        total += weights[i];
    }
    if (!normalised) {
        total = 0.0f;
        for (int64_t e = 0; e < experts; e++) total += exp_f32(routed(logits[e]) - largest);
    }
    for (int64_t i = 0; i < per_token; i++) weights[i] /= total;
}
