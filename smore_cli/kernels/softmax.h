/* Short rows of numbers: sums in an order of the compiler's own, the same at every call, and the softmax. */

#include "exp1.h"

static inline float dot(const float *x, const float *y, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static inline void softmax(const float *z, float *p, int n) {
    float most = z[0], total = 0;
    for (int e = 0; e < n; e++) most = z[e] > most ? z[e] : most;
    for (int e = 0; e < n; e++) p[e] = exp1(z[e] - most);
#pragma omp simd reduction(+ : total)
    for (int e = 0; e < n; e++) total += p[e];
    for (int e = 0; e < n; e++) p[e] /= total;
}
