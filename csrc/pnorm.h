// What the ball of a p-norm is made of, for host and device: powers of a gradient's elements relative to the
// largest one, (|g| / m)^y with m = max |g|. They are from 0 to 1: nothing overflows for any y >= 0.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common.h"

namespace sharpkern {

// x where something holds, else 0.
template <class A>
SK_INLINE A where(bool holds, A x) {
  return holds ? x : A(0);
}

SK_INLINE double log2_of(double x) { return std::log2(x); }
SK_INLINE double exp2_of(double x) { return std::exp2(x); }

#ifdef __CUDA_ARCH__
SK_INLINE float log2_of(float x) { return log2f(x); }
SK_INLINE float exp2_of(float x) { return exp2f(x); }
#else
// On the host of float, without a branch or a call: loops over these are vectorised.

SK_INLINE float where(bool holds, float x) {
  return std::bit_cast<float>(std::bit_cast<int32_t>(x) & -static_cast<int32_t>(holds));
}

// Of a normal x > 0, to 2 ulp: x = 2^e f with f from sqrt(1/2) to sqrt(2); log f = 2 atanh(s), s = (f - 1) /
// (f + 1).
SK_INLINE float log2_of(float x) {
  // Unsigned: of another x, whose result is not used, this may overflow.
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int32_t e = static_cast<int32_t>(bits - std::bit_cast<uint32_t>(0.707106781f)) >> 23;
  const float f = std::bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23));
  const float s = (f - 1) / (f + 1);
  const float z = s * s;
  const float series = s * (z * (1 / 3.f + z * (1 / 5.f + z * (1 / 7.f + z * (1 / 9.f)))));
  return static_cast<float>(e) + 2.885390082f * (s + series);  // 2 / log(2)
}

// Of x <= 0, to 2 ulp; 0 where it is no normal number: x = n + r / log(2) with |r| up to log(2) / 2.
SK_INLINE float exp2_of(float x) {
  const float within = where(x > -126, x);
  const int32_t n = static_cast<int32_t>(within - 0.5f);
  const float r = 0.693147181f * (within - static_cast<float>(n));  // log(2)
  const float tail = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)));
  const float exp = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * tail)));
  return where(
      x > -126, std::bit_cast<float>(std::bit_cast<uint32_t>(exp) + (static_cast<uint32_t>(n) << 23)));
}
#endif

// The largest magnitude m, in the arithmetic type.
template <class A>
struct Peak {
  // What is below m 2^-kFar is divided by m 2^-kFar: its quotient by m may be no normal number.
  static constexpr int kFar = sizeof(A) == 4 ? 100 : 1000;
  static constexpr double kMuch = sizeof(A) == 4 ? 0x1p100 : 0x1p1000;  // 2^kFar
  A largest;
  A far;
  A near;     // 1; another power of 2 where 1 / m would be no normal number
  A inverse;  // 1 / (near m)

  SK_INLINE explicit Peak(double m)
      : largest(static_cast<A>(m)),
        far(static_cast<A>(m / kMuch)),
        near(
            static_cast<A>(
                largest < 1 / kMuch ? kMuch
                : largest > kMuch   ? 1.0 / 16
                                    : 1.0)),
        inverse(static_cast<A>(1 / (static_cast<double>(largest) * static_cast<double>(near)))) {}
  Peak() = default;

  // (|g| / m)^y. 0 for g = 0, whatever y and m; NaN for what is not finite.
  SK_INLINE A power(A g, A y) const {
    const A a = g < 0 ? -g : g;
    const bool is_far = a < far;
    const A ratio = a * (where(is_far, A(kMuch)) + where(!is_far, A(1))) / largest;
    const A log_ratio = log2_of(ratio) - where(is_far, A(kFar));
    return where(a > 0, exp2_of(y * log_ratio)) + (a - a);
  }

  // The same for y >= 1: what is far is below 2^-kFar, and taken for 0 or as much. No division.
  SK_INLINE A large_power(A g, A y) const {
    const A a = g < 0 ? -g : g;
    return where(a > 0, exp2_of(y * log2_of(a * near * inverse))) + (a - a);
  }
};

// SAM in the ball of a p-norm: w + d sign(g) with d = s (|g| / m)^y, or with d = s where p is infinite.
template <bool kSign, class A>
SK_INLINE A ascend_p(A w, A g, A s, const Peak<A>& peak, A y) {
  const A d = kSign ? s : s * peak.power(g, y);
  return w + (where(g > 0, d) - where(g < 0, d)) + (g - g);
}

// The largest magnitude of a gradient, from those in its flat buffers.
SK_INLINE double largest_of(const double* largest, int64_t buffers) {
  double m = 0;
  for (int64_t i = 0; i < buffers; ++i) {
    m = largest[i] > m ? largest[i] : m;
  }
  return m;
}

// Where the largest magnitudes go, beside the squared norms.
inline double* maxima_beside(const NormOutput& output, const Tensor& largest) {
  STD_TORCH_CHECK(
      largest.numel() == output.buffers,
      "sharpkern: largest should have an element for each of sq, which has ", output.buffers, ", found ",
      largest.numel());
  return vector(largest, "largest");
}

// ||g||_q as the ascent needs it, from m and the sum of the powers: one element a flat buffer.
struct DualNorm {
  const double* maxima;
  int64_t maximum_count;
  const double* powers;
  int64_t power_count;
  double exponent;  // q - 1
  double eps;

  DualNorm(const Tensor& largest, const Tensor& sums, double exponent, double eps)
      : maxima(vector(largest, "largest")),
        maximum_count(largest.numel()),
        powers(vector(sums, "powers")),
        power_count(sums.numel()),
        exponent(exponent),
        eps(eps) {
    STD_TORCH_CHECK(exponent >= 0, "sharpkern: exponent should be 0 or more, found ", exponent);
  }

  SK_INLINE double largest() const { return largest_of(maxima, maximum_count); }

  // (m / (||g||_q + eps))^(q - 1), 0 for a gradient of zeros.
  SK_INLINE double scale() const {
    if (exponent == 0) {
      return 1;
    }
    const double root = std::pow(sum_of_buffers(powers, power_count), 1 / (exponent + 1));
    return std::pow(root + eps / largest(), -exponent);
  }
};

}  // namespace sharpkern
