/* Softmax, picks, gates and the core of a flat method for a CPU, forward and backward.

   The equations are those of nn/routed_block.py: of a token with latents h_e (r), the same h for all where it is a fan,

       p = softmax(z)        m = the picked ones        g = p m [ / sum p m ]        y_e = g_e h_e

   Picked are all, the k largest, those that make up a mass (`TopP` of nn/selection.py), or, where the entropy is high, all
   again (`EntropyHybrid` of nn/entropy.py).

   All that a token has is some forty numbers side by side, so a token goes through everything before the next one. A
   loop over experts or ranks is what the compiler makes vectors of. */

#include "softmax.h"

#define EXPERTS 64 /* most experts; MOST_EXPERTS in block.py */
enum { GIVEN = -1, BY_MASS = -2 }; /* `picks` that are no number */
#define EACH for (int e = 0; e < s; e++)

typedef struct {
    int64_t n, stride;                /* tokens; floats from one token's latent to the next one's */
    int32_t s, r, fan, renormalise;   /* experts, rank */
    int32_t picks;                    /* k of the largest; 0: all experts; GIVEN: those that `picked` says; BY_MASS */
    int32_t least, crossing, hybrid;  /* by mass: at least so many; with the one that crosses; all where unsure */
    float mass, q, eps, largest, threshold; /* the last four of the entropy: what divides it, above what it is high */
    const float *latent;              /* (n, r or s r, then s logits) */
    float *p, *g;                     /* (n, s); no g where all are picked */
    uint8_t *picked;                  /* (n, s), none where all are */
} Block;

static inline void places(const float *p, int32_t *before, int s) { /* of equal ones the first goes first */
    EACH before[e] = 0;
    for (int o = 0; o < s; o++) EACH before[e] += (p[o] > p[e]) | ((p[o] == p[e]) & (o < e));
}

static inline float entropy(const Block *b, const float *p, int s) { /* Tsallis; at q = 1 Shannon's */
    float x[EXPERTS], slope[EXPERTS], step = b->q - 1;
    EACH x[e] = p[e] + b->eps;
    EACH slope[e] = log1(x[e] > 1.17549435e-38f ? x[e] : 1.17549435e-38f);
    if (step == 0) return -dot(x, slope, s);
    EACH slope[e] = less1(step * slope[e]);
    return -dot(x, slope, s) / step - s * b->eps / step;
}

static inline void pick(const Block *b, const float *p, uint8_t *picked, int s) {
    int32_t before[EXPERTS], order[EXPERTS];
    places(p, before, s);
    if (b->picks > 0) {
        EACH picked[e] = before[e] < b->picks;
        return;
    }
    EACH order[e] = e; /* of NaNs all are before nobody */
    EACH order[before[e]] = e;
    float reached = 0;
    for (int n = 0; n < s; n++) {
        float next = reached + p[order[n]];
        int keep = b->crossing ? (n == 0 || reached <= b->mass) : next <= b->mass;
        picked[order[n]] = keep || b->mass >= 1 || n < b->least;
        reached = next;
    }
    if (b->hybrid && entropy(b, p, s) / b->largest > b->threshold) EACH picked[e] = 1;
}

static inline float mass(const float *p, const uint8_t *picked, int s) {
    float total = 0;
    EACH total += p[e] * picked[e];
    return total;
}

static inline __attribute__((always_inline)) void mix(const Block *b, float *out, int r) {
    int s = b->s, step = b->fan ? 0 : r, width = b->fan ? r : s * r;
    for (int64_t t = 0; t < b->n; t++) {
        const float *h = b->latent + t * b->stride;
        float *y = out + t * s * r, *p = b->p + t * s, *g = p;
        if (b->picks != GIVEN) softmax(h + width, p, s);
        if (b->picks) {
            uint8_t *picked = b->picked + t * s;
            if (b->picks != GIVEN) pick(b, p, picked, s);
            float total = b->renormalise ? mass(p, picked, s) : 1;
            g = b->g + t * s;
            EACH g[e] = p[e] * picked[e] / total; /* a NaN stays one */
        }
        EACH for (int i = 0; i < r; i++) y[e * r + i] = g[e] * h[e * step + i];
    }
}

static inline __attribute__((always_inline)) void slopes(
    const Block *b, const float *dout, const float *dp_given, const float *dg_given, float *dlatent, int r) {
    int s = b->s, step = b->fan ? 0 : r, width = b->fan ? r : s * r;
    float dg[EXPERTS];
    for (int64_t t = 0; t < b->n; t++) {
        const float *h = b->latent + t * b->stride, *p = b->p + t * s, *g = b->picks ? b->g + t * s : p;
        float *dh = dlatent + t * (width + s), *dz = dh + width;
        for (int i = 0; i < width; i++) dh[i] = 0;
        EACH dg[e] = dg_given ? dg_given[t * s + e] : 0;
        if (dout) {
            const float *dy = dout + t * s * r;
            EACH {
                float sum = 0;
                for (int i = 0; i < r; i++) {
                    sum += dy[e * r + i] * h[e * step + i];
                    dh[e * step + i] += g[e] * dy[e * r + i];
                }
                dg[e] += sum;
            }
        }
        if (b->picks) { /* dp = m (dg - <g, dg>) / sum p m */
            const uint8_t *picked = b->picked + t * s;
            float along = 0, total = 1;
            if (b->renormalise) {
                total = mass(p, picked, s);
                EACH along += g[e] * dg[e];
            }
            EACH dg[e] = picked[e] ? (dg[e] - along) / total : 0;
        }
        float mean = 0;
        EACH dg[e] += dp_given ? dp_given[t * s + e] : 0;
        EACH mean += p[e] * dg[e];
        EACH dz[e] = p[e] * (dg[e] - mean);
    }
}

/* The usual ranks by themselves: of a loop whose length is known the compiler leaves nothing. */
#define OF_RANK(call) \
    switch (b->r) { \
    case 4: { enum { r = 4 }; call; break; } \
    case 8: { enum { r = 8 }; call; break; } \
    default: { int r = b->r; call; } \
    }

void smore_block_forward(const Block *b, float *out) { OF_RANK(mix(b, out, r)) }

void smore_block_backward(const Block *b, const float *dout, const float *dp, const float *dg, float *dlatent) {
    OF_RANK(slopes(b, dout, dp, dg, dlatent, r))
}
