// Every update formula of the package, written once, for host and device.
//
// A is the arithmetic type: float for float32, bfloat16 and float16 storage, double for float64.
// The expressions keep the order of operations of torch.optim, so that a fused multiply-add lands
// where torch's own kernels have theirs.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SK_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SK_INLINE inline __attribute__((always_inline))
#else
#define SK_INLINE inline
#endif

namespace sharpkern {

// T_w = |w| + eta, the elementwise scale of ASAM.
template <class A>
SK_INLINE A adaptive_scale(A w, A eta) {
  return (w < A(0) ? -w : w) + eta;
}

// SAM: w + s g, with s = rho / (||g|| + eps).
template <class A>
SK_INLINE A ascend(A w, A g, A s) {
  return w + s * g;
}

// ASAM: w + s T_w^2 g, with s = rho / (||T_w g|| + eps).
template <class A>
SK_INLINE A ascend_scaled(A w, A g, A s, A eta) {
  const A t = adaptive_scale(w, eta);
  return w + s * (t * (t * g));
}

// LookSAM: the part of g_s that is orthogonal to g, g_s - (<g, g_s> / ||g||^2) g.
template <class A>
SK_INLINE A orthogonal(A g_s, A g, A along) {
  return g_s - along * g;
}

// A direction with a norm up to this is none; schema.py has its twin.
constexpr double kNormMin = 1e-12;

// x / y, or sqrt(x) / sqrt(y), of two squared norms or products; 0 where there is nothing to divide by.
SK_INLINE double quotient(double x, double y, bool root) {
  const double norm = std::sqrt(y);
  if (!(norm > kNormMin)) {
    return 0;
  }
  return root ? std::sqrt(x) / norm : x / y;
}

// constant + slope q. A slope of 0 takes no q: 0 * inf would be NaN.
SK_INLINE double on_line(double constant, double slope, double q) {
  return slope == 0 ? constant : constant + slope * q;
}

// The direction of a base rule before clipping, or a running average: a g + b v. Written so that with a = 1 a
// fused multiply-add takes b v, and a g is exact.
template <class A>
SK_INLINE A combined(A g, A v, A a, A b) {
  return b * v + a * g;
}

// Columns of AE-SAM's statistics; schema.py names them.
enum EmaValue : int64_t { kEmaMean, kEmaVar, kEmaThreshold, kEmaFired, kEmaValues };

// AE-SAM's statistics of n = ||g||^2, and whether it is at least mean + coefficient sqrt(var).
SK_INLINE void update_ema(double* ema, double n, double decay, double coefficient) {
  const double mean = decay * ema[kEmaMean] + (1 - decay) * n;
  const double var = decay * ema[kEmaVar] + (1 - decay) * ((n - mean) * (n - mean));
  ema[kEmaFired] = 0;
  if (!std::isfinite(var)) {
    return;  // nor is it when n is not
  }
  const double spread = std::sqrt(var);
  // An infinite coefficient times a spread of 0 would be NaN.
  const bool regular = spread > 0 || std::isfinite(coefficient);
  ema[kEmaMean] = mean;
  ema[kEmaVar] = var;
  ema[kEmaThreshold] = mean + (regular ? coefficient * spread : coefficient);
  ema[kEmaFired] = n >= ema[kEmaThreshold] ? 1 : 0;
}

// sum + c x. A c of 0 takes no x, as in torch.optim: 0 * inf would be NaN.
template <class A>
SK_INLINE A plus(A sum, A c, A x) {
  return sum + c * (c != 0 ? x : A(-0.0));  // of a -0, too, the sum stays what it was
}

// What one row of parameters needs to take an SGD step. Conditions on the group become coefficients,
// so that the loop over elements has no branch.
template <class A>
struct SgdCoefficients {
  A lr;
  A weight_decay;
  A gradient;       // +scale, or -scale when maximizing
  A momentum;       // 0 on the first step: the buffer becomes the raw gradient
  A intake;         // 1 - dampening, 1 on the first step
  A from_gradient;  // nesterov: 1 and momentum; else 0 and 1
  A from_buffer;
};

// Columns of a group's values; schema.py names them.
enum SgdValue : int64_t {
  kSgdLr,
  kSgdMomentum,
  kSgdDampening,
  kSgdWeightDecay,
  kSgdNesterov,
  kSgdMaximize,
  kSgdValues
};

// From a group's values, whether the row steps for the first time, and the factor of its gradient: clip, or
// clip a.
template <class A>
SK_INLINE SgdCoefficients<A> sgd_coefficients(const double* v, bool first, double scale) {
  const bool nesterov = v[kSgdNesterov] != 0;
  SgdCoefficients<A> c;
  c.lr = v[kSgdLr];
  c.weight_decay = v[kSgdWeightDecay];
  c.gradient = v[kSgdMaximize] != 0 ? -scale : scale;
  c.momentum = first ? 0 : v[kSgdMomentum];
  c.intake = first ? 1 : 1 - v[kSgdDampening];
  c.from_gradient = nesterov ? 1 : 0;
  c.from_buffer = nesterov ? v[kSgdMomentum] : 1;
  return c;
}

// buf = momentum buf + intake (c g + weight_decay w);  w - lr (from_gradient g + from_buffer buf)
template <class A>
SK_INLINE A sgd_momentum(A w, A g, A& buffer, const SgdCoefficients<A>& c) {
  const A d = plus(c.gradient * g, c.weight_decay, w);
  buffer = c.momentum * buffer + c.intake * d;
  return w - c.lr * (c.from_gradient * d + c.from_buffer * buffer);
}

// w - lr (c g + weight_decay w)
template <class A>
SK_INLINE A sgd_plain(A w, A g, const SgdCoefficients<A>& c) {
  return w - c.lr * plus(c.gradient * g, c.weight_decay, w);
}

// Directions that SGD is nudged along, at most; schema.py has its twin.
constexpr int kMostDirections = 8;

// Columns of a group's values, SGD's first; schema.py names them.
enum NudgeValue : int64_t { kNudge = kSgdValues, kNudgeValues };

// SGD's, of the factor of the gradient; without momentum every step is like a first one.
template <class A>
SK_INLINE SgdCoefficients<A> nudge_coefficients(const double* v, bool first, double scale) {
  return sgd_coefficients<A>(v, first || v[kSgdMomentum] == 0, scale);
}

// The next momentum buffer without what the gradient adds, and that.
template <class A>
SK_INLINE A sgd_kept(A w, A buffer, const SgdCoefficients<A>& c) {
  return c.momentum * buffer + c.intake * plus(A(0), c.weight_decay, w);
}
template <class A>
SK_INLINE A sgd_pulled(A g, const SgdCoefficients<A>& c) {
  return c.intake * (c.gradient * g);
}

// buf = momentum buf + intake (c g + weight_decay w);  w - lr (buf + correction)
template <class A>
SK_INLINE A nudge_sgd(A w, A g, A& buffer, A correction, const SgdCoefficients<A>& c) {
  buffer = c.momentum * buffer + c.intake * plus(c.gradient * g, c.weight_decay, w);
  return w - c.lr * (buffer + correction);
}

template <class A>
struct AdamCoefficients {
  A gradient;      // +scale, or -scale when maximizing
  A shrink;        // AdamW: 1 - lr weight_decay; Adam: 1
  A weight_decay;  // Adam: added to the gradient; AdamW: 0
  A one_minus_beta1;
  A beta2;
  A one_minus_beta2;
  A step_size;              // lr / (1 - beta1^t)
  A sqrt_bias_correction2;  // sqrt(1 - beta2^t)
  A eps;
};

enum AdamValue : int64_t {
  kAdamLr,
  kAdamBeta1,
  kAdamBeta2,
  kAdamEps,
  kAdamWeightDecay,
  kAdamAmsgrad,
  kAdamMaximize,
  kAdamDecoupled,
  kAdamValues
};

// From a group's values, the row's steps with this one, and the factor of its gradient: clip, or clip a.
template <class A>
SK_INLINE AdamCoefficients<A> adam_coefficients(const double* v, double t, double scale) {
  const bool decoupled = v[kAdamDecoupled] != 0;
  AdamCoefficients<A> c;
  c.gradient = v[kAdamMaximize] != 0 ? -scale : scale;
  c.shrink = decoupled ? 1 - v[kAdamLr] * v[kAdamWeightDecay] : 1;
  c.weight_decay = decoupled ? 0 : v[kAdamWeightDecay];
  c.one_minus_beta1 = 1 - v[kAdamBeta1];
  c.beta2 = v[kAdamBeta2];
  c.one_minus_beta2 = 1 - v[kAdamBeta2];
  // The bias corrections need the range of float64: 1 - 0.999^t loses half its bits in float32.
  c.step_size = v[kAdamLr] / (1 - std::pow(v[kAdamBeta1], t));
  c.sqrt_bias_correction2 = std::sqrt(1 - std::pow(v[kAdamBeta2], t));
  c.eps = v[kAdamEps];
  return c;
}

template <class A>
SK_INLINE A root(A x) {
  return __builtin_sqrt(x);
}
template <>
SK_INLINE float root(float x) {
  return __builtin_sqrtf(x);
}

// m = beta1 m + (1 - beta1) d;  v = beta2 v + (1 - beta2) d^2, with d = c g + weight_decay w;
// w shrink - step_size m / (sqrt(v) / sqrt(1 - beta2^t) + eps).  AMSGrad: the largest v so far.
template <bool kAmsgrad, class A>
SK_INLINE A adam(A w, A g, A& m, A& v, A& vmax, const AdamCoefficients<A>& c) {
  const A d = plus(c.gradient * g, c.weight_decay, w);
  m = m + c.one_minus_beta1 * (d - m);
  v = c.beta2 * v + (c.one_minus_beta2 * d) * d;
  A second = v;
  if constexpr (kAmsgrad) {
    vmax = vmax > v ? vmax : v;
    second = vmax;
  }
  return c.shrink * w - c.step_size * (m / (root(second) / c.sqrt_bias_correction2 + c.eps));
}

}  // namespace sharpkern
