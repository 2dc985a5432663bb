/* e^x, e^x - 1 and ln x to 1e-7 of their value; compilers make vector code of them, which they cannot of the library's. */

#include <stdint.h>

typedef union { int32_t i; float f; } Bits;

/* e^x = 2^n (1 + m) with m = e^r - 1, |r| <= ln 2 / 2; the comparisons let a NaN through. */
static inline float parts1(float x, float *power) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    Bits bits = {((int32_t)n + 127) << 23};
    *power = bits.f;
    return p * r * r + r;
}

static inline float exp1(float x) {
    float power, m = parts1(x, &power);
    return (m + 1.0f) * power;
}

static inline float less1(float x) { /* e^x - 1, also where x is small */
    float power, m = parts1(x, &power);
    return m * power + (power - 1.0f);
}

static inline float log1(float x) { /* x = 2^n (1 + m), of normal numbers above 0 */
    Bits bits = {.f = x};
    int32_t n = (bits.i - 0x3f3504f3) >> 23;
    bits.i -= n * (1 << 23);
    float m = bits.f - 1.0f, p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * m * m - n * 2.12194440e-4f - 0.5f * m * m;
    return (m + p) + n * 0.693359375f;
}
