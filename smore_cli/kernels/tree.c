/* The core of an S'MoRE tree for a CPU: everything between its two wide products, forward and backward.

   The equations are those of nn/tree_router.py and nn/tree.py. With P_l = f_{l+1} .. f_{L-1} parents on level l, for
   every parent p of level l, from the root (l = L-1) down to the leaves:

       hidden = act_r( W1 [x_down; keys of p's ancestors] + b1 )      keys enter as rows of a table, keys W1^T
       logits = K2 hidden + kb                                        K2 = keys W2, kb = keys b2
       prob   = softmax(logits);  its f_l children are the largest;  alpha = softmax of theirs, or their prob

   and from the leaves up to the root, e_n = scale (B_n h_n + b_n):

       x_1[p]     = sum_n gate[p, n] act(e_n)                         each leaf activated once
       x_{l+1}[p] = sum_c alpha[c, p] act( e_chosen + W x_l[c, p] + w )

   A block of T tokens goes through all of it before the next one, so that nothing leaves the cache: every quantity is
   [features][T], tokens innermost, and a loop over t is a loop over the lanes of vector registers. Who was chosen is a
   one-hot row for every expert, so that to look something up is a product as well. All products are one of two:

       product    out (m, T) += scale W (m, k) in (k, T)              W by strides: transposed or not
       outer      G (m, k)   += a (m, T) b (k, T)^T                   gradients of parameters

   A node (child c of parent p) has the number c P_l + p, which is its number as a parent of the level below; the node
   on level k that parent p of level l descends from has the number p mod P_{k-1}. Tokens beyond the last are zeros with
   gradients of zero. A token's numbers do not depend on its place in a block, nor on the number of threads; gradients
   of parameters are sums over a thread's blocks, then over threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "exp1.h"

#define LEVELS 8 /* most levels of a tree; MOST_LEVELS in tree.py */
#define T 32     /* tokens of a block */
#define LANES 8  /* floats of a vector: a register of AVX, two of SSE or NEON */
#define COLS 2   /* vectors side by side in a product */
#define ROWS 8   /* rows of a product that are worked on at once */

typedef float vec __attribute__((vector_size(4 * LANES)));

enum { IDENTITY, TANH, RELU };

typedef struct {
    int32_t levels, width, latent, act, router_act, dense; /* latent: columns of the wide product */
    int32_t s[LEVELS], r[LEVELS], f[LEVELS], m[LEVELS], d[LEVELS + 1], pool[LEVELS], at[LEVELS], by_pool[LEVELS], down_at;
    float scale[LEVELS];
} Shape;

typedef struct { /* of a pool: B, b; of a level: the rest; W and w of level l > 0 */
    float *B[LEVELS], *b[LEVELS], *W[LEVELS], *w[LEVELS], *delta;
    float *keys[LEVELS], *W1[LEVELS], *b1[LEVELS], *W2[LEVELS], *b2[LEVELS];
    float *K2[LEVELS], *kb[LEVELS], *table[LEVELS][LEVELS]; /* made of the others: table[l][k], ancestor k of level l */
} Parameters;

typedef struct { /* (s or f, P, N) of each level, tokens innermost; as gradients any may be missing */
    int64_t *chosen[LEVELS];
    float *alpha[LEVELS], *logits[LEVELS], *prob[LEVELS];
} Picks;

typedef struct { /* of one block, all [..][T] */
    float *h, *x_down;
    float *token, *hidden[LEVELS], *logits[LEVELS], *prob[LEVELS], *onehot[LEVELS], *alpha[LEVELS];
    float *e[LEVELS], *out[LEVELS], *x[LEVELS + 1], *gate;
    float *dh, *dx_down, *dx[LEVELS + 1], *de, *dz, *dalpha[LEVELS], *dlogits, *dhidden, *dtoken, *dgate, *turned;
} Block;

/* ---------------------------------------------------------------------------------------------- one row of a block */

#define EACH_TOKEN for (int t = 0; t < T; t++)

static void zero(float *a, long rows) { memset(a, 0, sizeof(float) * T * rows); }

static inline float tanh1(float x) { /* a polynomial near 0, where the other form loses all digits */
    float size = x < 0 ? -x : x, square = x * x;
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    float low = p * square * x + x, high = 1.0f - 2.0f / (exp1(2.0f * size) + 1.0f);
    return size < 0.625f ? low : (x < 0 ? -high : high);
}

static void activate(float *a, int rows, int act) {
    if (act == TANH)
        for (long i = 0; i < (long)rows * T; i++) a[i] = tanh1(a[i]);
    if (act == RELU)
        for (long i = 0; i < (long)rows * T; i++) a[i] = a[i] < 0 ? 0 : a[i];
}

static void slope(float *grad, const float *out, int rows, int act) { /* grad *= act' */
    if (act == TANH)
        for (long i = 0; i < (long)rows * T; i++) grad[i] *= 1 - out[i] * out[i];
    if (act == RELU)
        for (long i = 0; i < (long)rows * T; i++) grad[i] = out[i] > 0 ? grad[i] : 0;
}

static void add_each(float *out, const float *bias, int rows, float scale) {
    for (int i = 0; i < rows; i++) EACH_TOKEN out[i * T + t] += scale * bias[i];
}

static void add_weighted(float *out, const float *a, const float *weight, int rows) { /* weight: (T) */
    for (int i = 0; i < rows; i++) EACH_TOKEN out[i * T + t] += weight[t] * a[i * T + t];
}

static void add_dots(float *out, const float *a, const float *b, int rows) { /* out: (T) */
    for (int i = 0; i < rows; i++) EACH_TOKEN out[t] += a[i * T + t] * b[i * T + t];
}

static inline vec load(const float *p) { return *(const vec *)p; }

static void add_row_sums(float *g, const float *a, int rows) {
    for (int i = 0; i < rows; i++) {
        vec sum = {0};
        for (int t = 0; t < T; t += LANES) sum += load(a + i * T + t);
        for (int j = 1; j < LANES; j++) sum[0] += sum[j];
        g[i] += sum[0];
    }
}

/* --------------------------------------------------------------------------------------------------- the two products */

static inline void product_rows(
    float *out, const float *W, long row, long col, int rows, int k, const float *in, float scale) {
    for (int v = 0; v < T; v += COLS * LANES) {
        vec sum[ROWS][COLS] = {0};
        for (int j = 0; j < k; j++)
            for (int i = 0; i < rows; i++)
                for (int c = 0; c < COLS; c++) sum[i][c] += W[i * row + j * col] * load(in + j * T + v + c * LANES);
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < COLS; c++) *(vec *)(out + i * T + v + c * LANES) += scale * sum[i][c];
    }
}

/* out (m, T) += scale W in, W (m, k) by the strides of a row and a column, in (k, T) */
static void product(float *out, const float *W, long row, long col, int m, int k, const float *in, float scale) {
    int i = 0;
    for (; i + ROWS <= m; i += ROWS) product_rows(out + i * T, W + i * row, row, col, ROWS, k, in, scale);
    for (; i < m; i++) product_rows(out + i * T, W + i * row, row, col, 1, k, in, scale);
}

/* b (k, T) as (T, k), filled up with zeros to whole registers; returns the length of a row */
static int turn(float *turned, const float *b, int k) {
    int row = (k + LANES - 1) / LANES * LANES;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < row; j++) turned[t * row + j] = j < k ? b[j * T + t] : 0;
    return row;
}

static inline void outer_tile(float *g, long row, int rows, int k, const float *a, const float *turned, int length) {
    vec sum[ROWS] = {0};
    for (int t = 0; t < T; t++)
        for (int i = 0; i < rows; i++) sum[i] += a[i * T + t] * load(turned + t * length);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < k; j++) g[i * row + j] += sum[i][j];
}

/* G (m, k) += a b^T, a (m, T), b (k, T); G by the stride of a row */
static void outer(float *g, long row, int m, int k, const float *a, const float *b, float *turned) {
    int length = turn(turned, b, k);
    for (int j = 0; j < k; j += LANES) {
        int cols = k - j < LANES ? k - j : LANES, i = 0;
        for (; i + ROWS <= m; i += ROWS)
            if (cols == LANES)
                outer_tile(g + i * row + j, row, ROWS, LANES, a + i * T, turned + j, length);
            else
                outer_tile(g + i * row + j, row, ROWS, cols, a + i * T, turned + j, length);
        for (; i < m; i++) outer_tile(g + i * row + j, row, 1, cols, a + i * T, turned + j, length);
    }
}

/* ------------------------------------------------------------------------------------------------------ sizes, tables */

static int parents(const Shape *q, int l) { /* P_l */
    int p = 1;
    for (int k = l + 1; k < q->levels; k++) p *= q->f[k];
    return p;
}

static int columns(const Shape *q, int l) { /* of W1: the token's, then each ancestor's key, the root's child first */
    int n = q->width;
    for (int k = l + 1; k < q->levels; k++) n += q->m[k];
    return n;
}

static int column_of(const Shape *q, int k) { /* where the key of an ancestor on level k begins */
    int n = q->width;
    for (int j = k + 1; j < q->levels; j++) n += q->m[j];
    return n;
}

static float *part(float *const **given, float **rest, long n) {
    if (*given) return *(*given)++;
    float *found = *rest;
    *rest += n;
    return found;
}

/* The parameters, in this order, which is that of `names` in tree.py, where `given` says; NULL: in one row from `at`.
   The tables come after what is there. Returns how many floats are. */
static long point(const Shape *q, Parameters *p, float *const *given, float *at) {
    float *rest = at, *const *none = NULL;
    int pools = q->pool[q->levels - 1] + 1;
    for (int l = 0; l < pools; l++) p->B[l] = part(&given, &rest, (long)q->s[l] * q->d[l + 1] * q->r[l]);
    for (int l = 0; l < pools; l++) p->b[l] = part(&given, &rest, (long)q->s[l] * q->d[l + 1]);
    for (int l = 1; l < q->levels; l++) p->W[l] = part(&given, &rest, (long)q->d[l + 1] * q->d[l]);
    for (int l = 1; l < q->levels; l++) p->w[l] = part(&given, &rest, q->d[l + 1]);
    p->delta = part(&given, &rest, q->width);
    for (int l = 0; l < q->levels; l++) {
        p->keys[l] = part(&given, &rest, (long)q->s[l] * q->m[l]);
        p->W1[l] = part(&given, &rest, (long)q->m[l] * columns(q, l));
        p->b1[l] = part(&given, &rest, q->m[l]);
        p->W2[l] = part(&given, &rest, (long)q->m[l] * q->m[l]);
        p->b2[l] = part(&given, &rest, q->m[l]);
    }
    for (int l = 0; l < q->levels; l++) {
        p->K2[l] = part(&none, &rest, (long)q->s[l] * q->m[l]);
        p->kb[l] = part(&none, &rest, q->s[l]);
        for (int k = l + 1; k < q->levels; k++) p->table[l][k] = part(&none, &rest, (long)q->s[k] * q->m[l]);
    }
    return rest - at;
}

/* C (m, n) += A (m, k) B (k, n), by the strides of rows and columns; small, and once a call */
static void small_product(
    float *C, long cr, const float *A, long ar, long ac, const float *B, long br, long bc, int m, int k, int n) {
    for (int i = 0; i < m; i++)
        for (int x = 0; x < k; x++)
            for (int j = 0; j < n; j++) C[i * cr + j] += A[i * ar + x * ac] * B[x * br + j * bc];
}

static void make_tables(const Shape *q, Parameters *p) { /* K2, kb and table are zero */
    for (int l = 0; l < q->levels; l++) {
        int s = q->s[l], m = q->m[l];
        small_product(p->K2[l], m, p->keys[l], m, 1, p->W2[l], m, 1, s, m, m);
        small_product(p->kb[l], 1, p->keys[l], m, 1, p->b2[l], 1, 1, s, m, 1);
        for (int k = l + 1; k < q->levels; k++)
            small_product(p->table[l][k], m, p->keys[k], q->m[k], 1, p->W1[l] + column_of(q, k), 1, columns(q, l),
                          q->s[k], q->m[k], m);
    }
}

static float *prepare(const Shape *q, Parameters *p, float *const *given) { /* returns the tables' memory; NULL: none */
    float *tables = calloc(point(q, p, given, (float *)64), sizeof(float));
    if (tables) {
        point(q, p, given, tables);
        make_tables(q, p);
    }
    return tables;
}

/* From the gradients of K2, kb and the tables to those of what they are made of. */
static void unmake_tables(const Shape *q, const Parameters *p, Parameters *g) {
    for (int l = 0; l < q->levels; l++) {
        int s = q->s[l], m = q->m[l];
        small_product(g->keys[l], m, g->K2[l], m, 1, p->W2[l], 1, m, s, m, m);
        small_product(g->W2[l], m, p->keys[l], 1, m, g->K2[l], m, 1, m, s, m);
        small_product(g->keys[l], m, g->kb[l], 1, 1, p->b2[l], 1, 1, s, 1, m);
        small_product(g->b2[l], 1, p->keys[l], 1, m, g->kb[l], 1, 1, m, s, 1);
        for (int k = l + 1; k < q->levels; k++) {
            int n = columns(q, l);
            small_product(g->keys[k], q->m[k], g->table[l][k], m, 1, p->W1[l] + column_of(q, k), n, 1, q->s[k], m,
                          q->m[k]);
            small_product(g->W1[l] + column_of(q, k), n, g->table[l][k], 1, m, p->keys[k], q->m[k], 1, m, q->s[k],
                          q->m[k]);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- memory */

static float *take(float **rest, long rows) {
    float *found = *rest;
    *rest += rows * T;
    return found;
}

static long most(long a, long b) { return a > b ? a : b; }

/* Lays a block out from `at`; returns how many floats it takes. */
static long lay_out(const Shape *q, Block *z, float *at) {
    float *rest = at;
    long top = q->levels - 1, s = 0, m = 0, e = 0, d = 0, ps = 0;
    z->h = take(&rest, q->latent);
    z->x_down = z->h + (long)q->down_at * T;
    for (int l = 0; l <= top; l++) {
        long P = parents(q, l), nodes = P * q->f[l];
        z->hidden[l] = take(&rest, P * q->m[l]);
        z->logits[l] = take(&rest, P * q->s[l]);
        z->prob[l] = take(&rest, P * q->s[l]);
        z->onehot[l] = take(&rest, nodes * q->s[l]);
        z->alpha[l] = take(&rest, nodes);
        z->dalpha[l] = take(&rest, nodes);
        z->e[l] = take(&rest, (long)q->s[l] * q->d[l + 1]);
        z->out[l] = take(&rest, l ? nodes * q->d[l + 1] : 0);
        z->x[l + 1] = take(&rest, P * q->d[l + 1]);
        z->dx[l + 1] = take(&rest, P * q->d[l + 1]);
        s = most(s, q->s[l]), m = most(m, q->m[l]), d = most(d, q->d[l + 1]);
        e = most(e, (long)q->s[l] * q->d[l + 1]), ps = most(ps, P * q->s[l]);
    }
    z->token = take(&rest, m), z->dtoken = take(&rest, m), z->dhidden = take(&rest, m);
    z->dlogits = take(&rest, s), z->de = take(&rest, e), z->dz = take(&rest, d);
    z->gate = take(&rest, ps), z->dgate = take(&rest, s);
    z->turned = take(&rest, most(most(d, m), most(q->width, s)) + LANES);
    z->dh = take(&rest, q->latent);
    z->dx_down = z->dh + (long)q->down_at * T;
    return rest - at;
}

static float *workspace(const Shape *q, Block *z) { /* a thread's own, kept for the next call; NULL: no memory */
    static _Thread_local float *held = NULL;
    static _Thread_local long size = 0;
    long needed = lay_out(q, z, (float *)64);
    if (needed > size) {
        free(held);
        held = aligned_alloc(64, sizeof(float) * needed);
        size = held ? needed : 0;
    }
    if (held) lay_out(q, z, held);
    return held;
}

/* In and out of a block: `rows` of length `stride`, tokens from `start`, of which `n` are there. */
static void load_tokens(float *a, const float *from, long stride, int width, long start, int n) {
    if (n < T) zero(a, width);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < width; i++) a[i * T + t] = from[(start + t) * stride + i];
}

static void store_tokens(float *to, const float *a, int width, long start, int n) {
    for (int t = 0; t < n; t++)
        for (int i = 0; i < width; i++) to[(start + t) * width + i] = a[i * T + t];
}

static void store_rows(float *to, const float *a, long rows, long N, long start, int n) {
    for (long i = 0; i < rows; i++) memcpy(to + i * N + start, a + i * T, sizeof(float) * n);
}

static void add_rows(float *a, const float *from, long rows, long N, long start, int n) {
    if (!from) return;
    for (long i = 0; i < rows; i++)
        for (int t = 0; t < n; t++) a[i * T + t] += from[i * N + start + t];
}

/* ------------------------------------------------------------------------------------------------------------ forward */

/* The f largest of s logits as one-hot rows, or those of `chosen`; `gap` rows lie between two children. */
static void choose(float *onehot, long gap, const float *logits, int s, int f, int dense) {
    for (int c = 0; c < f; c++) {
        float best[T];
        int32_t at[T];
        EACH_TOKEN best[t] = 0, at[t] = -1;
        for (int n = 0; n < s; n++) {
            int32_t open[T];
            EACH_TOKEN open[t] = !dense || n == c;
            for (int before = 0; before < c && !dense; before++)
                EACH_TOKEN open[t] &= onehot[(before * gap + n) * T + t] == 0;
            EACH_TOKEN {
                int better = open[t] & ((at[t] < 0) | (logits[n * T + t] > best[t]));
                best[t] = better ? logits[n * T + t] : best[t];
                at[t] = better ? n : at[t];
            }
        }
        for (int n = 0; n < s; n++) EACH_TOKEN onehot[(c * gap + n) * T + t] = at[t] == n;
    }
}

static void softmax(float *out, const float *in, int rows, long gap) { /* rows `gap` apart */
    float top[T], sum[T];
    EACH_TOKEN top[t] = in[t], sum[t] = 0;
    for (int n = 1; n < rows; n++) EACH_TOKEN top[t] = in[n * gap * T + t] > top[t] ? in[n * gap * T + t] : top[t];
    for (int n = 0; n < rows; n++) EACH_TOKEN {
            float each = exp1(in[n * gap * T + t] - top[t]);
            out[n * gap * T + t] = each;
            sum[t] += each;
        }
    for (int n = 0; n < rows; n++) EACH_TOKEN out[n * gap * T + t] /= sum[t];
}

static void route(const Shape *q, const Parameters *p, Block *z, const Picks *again, long N, long start, int n) {
    for (int l = q->levels - 1; l >= 0; l--) {
        int P = parents(q, l), s = q->s[l], m = q->m[l], f = q->f[l];
        zero(z->token, m);
        product(z->token, p->W1[l], columns(q, l), 1, m, q->width, z->x_down, 1);
        add_each(z->token, p->b1[l], m, 1);
        if (again) {
            zero(z->onehot[l], (long)f * P * s);
            for (long node = 0; node < (long)f * P; node++)
                for (int t = 0; t < n; t++)
                    z->onehot[l][(node * s + again->chosen[l][node * N + start + t]) * T + t] = 1;
        }
        for (int a = 0; a < P; a++) {
            float *hidden = z->hidden[l] + (long)a * m * T, *logits = z->logits[l] + (long)a * s * T;
            float *prob = z->prob[l] + (long)a * s * T, *onehot = z->onehot[l] + (long)a * s * T;
            float *alpha = z->alpha[l] + (long)a * T;
            memcpy(hidden, z->token, sizeof(float) * T * m);
            for (int k = l + 1; k < q->levels; k++) {
                long node = a % parents(q, k - 1);
                product(hidden, p->table[l][k], 1, m, m, q->s[k], z->onehot[k] + node * q->s[k] * T, 1);
            }
            activate(hidden, m, q->router_act);
            zero(logits, s);
            product(logits, p->K2[l], m, 1, s, m, hidden, 1);
            add_each(logits, p->kb[l], s, 1);
            softmax(prob, logits, s, 1);
            if (!again) choose(onehot, (long)P * s, logits, s, f, q->dense);
            const float *weighed = q->by_pool[l] ? prob : logits;
            for (int c = 0; c < f; c++) {
                zero(alpha + (long)c * P * T, 1);
                add_dots(alpha + (long)c * P * T, onehot + (long)c * P * s * T, weighed, s);
            }
            if (!q->by_pool[l]) softmax(alpha, alpha, f, P);
        }
    }
}

static void propagate(const Shape *q, const Parameters *p, Block *z) {
    for (int l = 0; l < q->levels; l++) {
        int P = parents(q, l), s = q->s[l], r = q->r[l], d = q->d[l + 1], below = q->d[l], own = q->pool[l];
        zero(z->e[l], (long)s * d);
        for (int n = 0; n < s; n++) {
            float *e = z->e[l] + (long)n * d * T;
            product(e, p->B[own] + (long)n * d * r, r, 1, d, r, z->h + (q->at[own] + n * r) * T, q->scale[l]);
            add_each(e, p->b[own] + n * d, d, q->scale[l]);
            if (l) add_each(e, p->w[l], d, 1);
        }
        if (!l) activate(z->e[0], s * d, q->act);
        zero(z->x[l + 1], (long)P * d);
        for (int a = 0; a < P; a++) {
            float *state = z->x[l + 1] + (long)a * d * T;
            if (!l) {
                float *gate = z->gate + (long)a * s * T;
                zero(gate, s);
                for (int c = 0; c < q->f[0]; c++)
                    add_weighted(gate, z->onehot[0] + ((long)c * P + a) * s * T, z->alpha[0] + (c * P + a) * T, s);
                for (int n = 0; n < s; n++) add_weighted(state, z->e[0] + (long)n * d * T, gate + n * T, d);
                continue;
            }
            for (int c = 0; c < q->f[l]; c++) {
                long node = (long)c * P + a;
                float *out = z->out[l] + node * d * T, *onehot = z->onehot[l] + node * s * T;
                zero(out, d);
                for (int n = 0; n < s; n++) add_weighted(out, z->e[l] + (long)n * d * T, onehot + n * T, d);
                product(out, p->W[l], below, 1, d, below, z->x[l] + node * below * T, 1);
                activate(out, d, q->act);
                add_weighted(state, out, z->alpha[l] + node * T, d);
            }
        }
    }
}

/* The trees of a block's tokens: who was picked, or with `again` who was picked before, and all states. */
static void grow(const Shape *q, const Parameters *p, Block *z, const float *latent, long stride, const Picks *again,
                 long N, long start, int n) {
    load_tokens(z->h, latent, stride, q->latent, start, n);
    add_each(z->x_down, p->delta, q->width, 1);
    route(q, p, z, again, N, start, n);
    propagate(q, p, z);
}

/* ----------------------------------------------------------------------------------------------------------- backward */

static void propagate_back(const Shape *q, const Parameters *p, Parameters *g, Block *z) {
    for (int l = q->levels - 1; l >= 0; l--) {
        int P = parents(q, l), s = q->s[l], r = q->r[l], d = q->d[l + 1], below = q->d[l], own = q->pool[l];
        zero(z->de, (long)s * d);
        if (l) zero(z->dx[l], (long)P * q->f[l] * below);
        for (int a = 0; a < P; a++) {
            const float *grad = z->dx[l + 1] + (long)a * d * T;
            if (!l) {
                zero(z->dgate, s);
                for (int n = 0; n < s; n++) {
                    add_weighted(z->de + (long)n * d * T, grad, z->gate + ((long)a * s + n) * T, d);
                    add_dots(z->dgate + n * T, grad, z->e[0] + (long)n * d * T, d);
                }
                for (int c = 0; c < q->f[0]; c++)
                    add_dots(z->dalpha[0] + (c * P + a) * T, z->onehot[0] + ((long)c * P + a) * s * T, z->dgate, s);
                continue;
            }
            for (int c = 0; c < q->f[l]; c++) {
                long node = (long)c * P + a;
                const float *out = z->out[l] + node * d * T, *onehot = z->onehot[l] + node * s * T;
                add_dots(z->dalpha[l] + node * T, grad, out, d);
                zero(z->dz, d);
                add_weighted(z->dz, grad, z->alpha[l] + node * T, d);
                slope(z->dz, out, d, q->act);
                outer(g->W[l], below, d, below, z->dz, z->x[l] + node * below * T, z->turned);
                add_row_sums(g->w[l], z->dz, d);
                product(z->dx[l] + node * below * T, p->W[l], 1, below, below, d, z->dz, 1);
                for (int n = 0; n < s; n++) add_weighted(z->de + (long)n * d * T, z->dz, onehot + n * T, d);
            }
        }
        if (!l) slope(z->de, z->e[0], s * d, q->act);
        if (q->scale[l] != 1)
            for (long i = 0; i < (long)s * d * T; i++) z->de[i] *= q->scale[l];
        for (int n = 0; n < s; n++) {
            const float *de = z->de + (long)n * d * T, *B = p->B[own] + (long)n * d * r;
            long at = (long)(q->at[own] + n * r) * T;
            outer(g->B[own] + (long)n * d * r, r, d, r, de, z->h + at, z->turned);
            add_row_sums(g->b[own] + n * d, de, d);
            product(z->dh + at, B, 1, r, r, d, de, 1);
        }
    }
}

/* grad_in += prob * (grad - <prob, grad>), rows `gap` apart */
static void softmax_back(float *in, const float *prob, const float *grad, int rows, long gap) {
    float dot[T] = {0};
    for (int n = 0; n < rows; n++) EACH_TOKEN dot[t] += prob[n * gap * T + t] * grad[n * gap * T + t];
    for (int n = 0; n < rows; n++)
        EACH_TOKEN in[n * gap * T + t] += prob[n * gap * T + t] * (grad[n * gap * T + t] - dot[t]);
}

static void route_back(const Shape *q, const Parameters *p, Parameters *g, Block *z, const Picks *grads, long N,
                       long start, int n) {
    for (int l = 0; l < q->levels; l++) {
        int P = parents(q, l), s = q->s[l], m = q->m[l], f = q->f[l], width = columns(q, l);
        zero(z->dtoken, m);
        add_rows(z->dalpha[l], grads->alpha[l], (long)f * P, N, start, n);
        for (int a = 0; a < P; a++) {
            const float *hidden = z->hidden[l] + (long)a * m * T, *prob = z->prob[l] + (long)a * s * T;
            const float *onehot = z->onehot[l] + (long)a * s * T;
            float *dalpha = z->dalpha[l] + (long)a * T, *alpha = z->alpha[l] + (long)a * T, *dprob = z->dgate;
            zero(z->dlogits, s);
            zero(dprob, s);
            for (int e = 0; e < s; e++) { /* both are laid out (s, P, N) */
                if (grads->logits[l])
                    add_rows(z->dlogits + e * T, grads->logits[l] + ((long)e * P + a) * N, 1, N, start, n);
                if (grads->prob[l]) add_rows(dprob + e * T, grads->prob[l] + ((long)e * P + a) * N, 1, N, start, n);
            }
            if (!q->by_pool[l]) { /* through the softmax of the picked: dalpha becomes the gradient of their logits */
                float dot[T] = {0};
                for (int c = 0; c < f; c++) EACH_TOKEN dot[t] += alpha[c * P * T + t] * dalpha[c * P * T + t];
                for (int c = 0; c < f; c++)
                    EACH_TOKEN dalpha[c * P * T + t] = alpha[c * P * T + t] * (dalpha[c * P * T + t] - dot[t]);
            }
            float *reached = q->by_pool[l] ? dprob : z->dlogits;
            for (int c = 0; c < f; c++)
                for (int e = 0; e < s; e++)
                    EACH_TOKEN reached[e * T + t] += onehot[((long)c * P * s + e) * T + t] * dalpha[c * P * T + t];
            softmax_back(z->dlogits, prob, dprob, s, 1);
            outer(g->K2[l], m, s, m, z->dlogits, hidden, z->turned);
            add_row_sums(g->kb[l], z->dlogits, s);
            zero(z->dhidden, m);
            product(z->dhidden, p->K2[l], 1, m, m, s, z->dlogits, 1);
            slope(z->dhidden, hidden, m, q->router_act);
            for (long i = 0; i < (long)m * T; i++) z->dtoken[i] += z->dhidden[i];
            for (int k = l + 1; k < q->levels; k++) {
                long node = a % parents(q, k - 1);
                outer(g->table[l][k], m, q->s[k], m, z->onehot[k] + node * q->s[k] * T, z->dhidden, z->turned);
            }
        }
        outer(g->W1[l], width, m, q->width, z->dtoken, z->x_down, z->turned);
        add_row_sums(g->b1[l], z->dtoken, m);
        product(z->dx_down, p->W1[l], 1, width, q->width, m, z->dtoken, 1);
    }
    add_row_sums(g->delta, z->dx_down, q->width);
}

/* -------------------------------------------------------------------------------------------------------------- calls */

static int thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Floats of all parameters and tables. */
int64_t smore_tree_size(const Shape *q) {
    Parameters p;
    return point(q, &p, NULL, (float *)64);
}

/* Returns 0, or 1 where there was no memory.

   latent: N rows of `stride`. state (N, d_L) and all of `picks`, unless it is NULL, are written. */
int smore_tree_forward(const Shape *q, float *const *parameters, const float *latent, int64_t stride, int64_t N,
                       float *state, const Picks *picks, int threads) {
    Parameters p;
    float *tables = prepare(q, &p, parameters);
    int failed = !tables;
#pragma omp parallel num_threads(threads)
    {
        Block z;
        if (!workspace(q, &z)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long start = 0; start < (failed ? 0 : N); start += T) {
            int n = N - start < T ? N - start : T, L = q->levels;
            grow(q, &p, &z, latent, stride, NULL, N, start, n);
            store_tokens(state, z.x[L], q->d[L], start, n);
            for (int l = 0; l < (picks ? L : 0); l++) {
                long P = parents(q, l), s = q->s[l], nodes = P * q->f[l];
                store_rows(picks->alpha[l], z.alpha[l], nodes, N, start, n);
                for (long a = 0; a < P; a++)
                    for (long e = 0; e < s; e++) {
                        store_rows(picks->logits[l] + (e * P + a) * N, z.logits[l] + (a * s + e) * T, 1, N, start, n);
                        store_rows(picks->prob[l] + (e * P + a) * N, z.prob[l] + (a * s + e) * T, 1, N, start, n);
                    }
                for (long node = 0; node < nodes; node++)
                    for (int t = 0; t < n; t++) {
                        int64_t found = 0;
                        for (long e = 0; e < s; e++) found += e * (int64_t)z.onehot[l][(node * s + e) * T + t];
                        picks->chosen[l][node * N + start + t] = found;
                    }
            }
        }
    }
    free(tables);
    return failed;
}

/* Returns 0, or 1 where there was no memory.

   The forward pass is made once more, with the children that were picked then. gradients: one row of smore_tree_size
   for each thread, all zero; the first is what is looked for. dlatent (N, latent) is written. */
int smore_tree_backward(const Shape *q, float *const *parameters, const float *latent, int64_t stride, int64_t N,
                        const float *dstate, const Picks *picks, const Picks *grads, float *dlatent, float *gradients,
                        int threads) {
    Parameters p, first;
    float *tables = prepare(q, &p, parameters);
    long size = smore_tree_size(q);
    int failed = !tables;
#pragma omp parallel num_threads(threads)
    {
        Block z;
        Parameters g;
        point(q, &g, NULL, gradients + thread() * size);
        if (!workspace(q, &z)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long start = 0; start < (failed ? 0 : N); start += T) {
            int n = N - start < T ? N - start : T, L = q->levels;
            grow(q, &p, &z, latent, stride, picks, N, start, n);
            zero(z.dh, q->latent);
            for (int l = 0; l < L; l++) zero(z.dalpha[l], (long)parents(q, l) * q->f[l]);
            load_tokens(z.dx[L], dstate, q->d[L], q->d[L], start, n);
            propagate_back(q, &p, &g, &z);
            route_back(q, &p, &g, &z, grads, N, start, n);
            store_tokens(dlatent, z.dh, q->latent, start, n);
        }
    }
    for (int k = 1; k < threads; k++)
        for (long i = 0; i < size; i++) gradients[i] += gradients[k * size + i];
    point(q, &first, NULL, gradients);
    if (!failed) unmake_tables(q, &p, &first);
    free(tables);
    return failed;
}
