/* Softmax, prior and the grid of a flat method for a CPU, forward and backward.

   The equations are those of nn/routed_grid.py: of a token with latents h (r1), logits z (r1 r2) and the prior s (r1 r2)
   of its sequence,

       p = softmax(z)       g = a p + b s             y_j = sum_i g_ij h_i
       a = c gam lam        b = c' gam (1 - lam)      lam = sigmoid(kappa omega)      gam = sigmoid(kappa nu)

       dh_i = sum_j g_ij dy_j      dg_ij += h_i dy_j      dp += a dg        dz = softmax'(dp)
       da = <dg, p>                db = <dg, s>           dlam = gam (c da - c' db)   dgam = c lam da + c' (1 - lam) db

   A token goes through everything before the next one. */

#include <math.h>
#include <stddef.h>

#include "softmax.h"

#define PAIRS 256 /* most experts; MOST_EXPERTS in grid.py */

typedef struct {
    int64_t n, stride, length;        /* tokens; floats from one latent to the next; tokens of a sequence */
    int32_t r1, r2;
    float token_scale, prior_scale, sharpness; /* c, c', kappa */
    const float *latent;              /* (n, r1, then r1 r2 logits) */
    const float *omega, *nu;          /* one number each */
    const float *prior;               /* (sequences, r1 r2), or none */
    const int64_t *document;          /* (n) which sequence a token is of; none: they are of one length */
} Grid;

typedef struct { float lam, gam, a, b; } Weights;

static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

static inline Weights weights(const Grid *b) {
    float lam = sigmoid(b->sharpness * *b->omega), gam = sigmoid(b->sharpness * *b->nu);
    return (Weights){lam, gam, b->token_scale * gam * lam, b->prior_scale * gam * (1 - lam)};
}

static inline const float *prior_of(const Grid *b, int64_t t, int k) {
    if (!b->prior) return NULL;
    int64_t which = !b->document ? t / b->length : b->document[t] < 0 ? 0 : b->document[t];
    return b->prior + which * k;
}

static inline void weigh(Weights w, const float *p, const float *s, float *g, int k) {
    for (int e = 0; e < k; e++) g[e] = w.a * p[e];
    if (s) for (int e = 0; e < k; e++) g[e] += w.b * s[e];
}

static inline __attribute__((always_inline)) void mix(
    const Grid *b, float *out, float *probabilities, float *gates, int r1, int r2) {
    int k = r1 * r2;
    Weights w = weights(b);
    for (int64_t t = 0; t < b->n; t++) {
        const float *h = b->latent + t * b->stride;
        float *y = out + t * r2, *p = probabilities + t * k, *g = gates + t * k;
        softmax(h + r1, p, k);
        weigh(w, p, prior_of(b, t, k), g, k);
        for (int j = 0; j < r2; j++) y[j] = 0;
        for (int i = 0; i < r1; i++) for (int j = 0; j < r2; j++) y[j] += g[i * r2 + j] * h[i];
    }
}

static inline __attribute__((always_inline)) void slopes(
    const Grid *b, const float *dout, const float *dp_given, const float *dg_given, float *dlatent, float *slope,
    int r1, int r2) {
    int k = r1 * r2;
    Weights w = weights(b);
    float p[PAIRS], g[PAIRS], dg[PAIRS], dp[PAIRS];
    double da = 0, db = 0; /* over all tokens */
    for (int64_t t = 0; t < b->n; t++) {
        const float *h = b->latent + t * b->stride, *s = prior_of(b, t, k);
        float *dh = dlatent + t * (r1 + k), *dz = dh + r1;
        softmax(h + r1, p, k);
        for (int i = 0; i < r1; i++) dh[i] = 0;
        for (int e = 0; e < k; e++) dg[e] = dg_given ? dg_given[t * k + e] : 0;
        if (dout) {
            const float *dy = dout + t * r2;
            weigh(w, p, s, g, k);
            for (int i = 0; i < r1; i++) {
                dh[i] = dot(g + i * r2, dy, r2);
                for (int j = 0; j < r2; j++) dg[i * r2 + j] += h[i] * dy[j];
            }
        }
        da += dot(dg, p, k);
        if (s) db += dot(dg, s, k);
        for (int e = 0; e < k; e++) dp[e] = w.a * dg[e] + (dp_given ? dp_given[t * k + e] : 0);
        float mean = dot(p, dp, k);
        for (int e = 0; e < k; e++) dz[e] = p[e] * (dp[e] - mean);
    }
    da *= b->token_scale, db *= b->prior_scale;
    slope[0] = b->sharpness * w.lam * (1 - w.lam) * w.gam * (float)(da - db);
    slope[1] = b->sharpness * w.gam * (1 - w.gam) * (float)(w.lam * da + (1 - w.lam) * db);
}

/* The usual shape by itself: of a loop whose length is known the compiler leaves nothing. */
#define OF_SHAPE(call) \
    if (b->r1 == 4 && b->r2 == 8) { enum { r1 = 4, r2 = 8 }; call; } \
    else { int r1 = b->r1, r2 = b->r2; call; }

void smore_grid_forward(const Grid *b, float *out, float *p, float *g) { OF_SHAPE(mix(b, out, p, g, r1, r2)) }

void smore_grid_backward(
    const Grid *b, const float *dout, const float *dp, const float *dg, float *dlatent, float *slope) {
    OF_SHAPE(slopes(b, dout, dp, dg, dlatent, slope, r1, r2))
}
