// Vectors of the widest register that this file is compiled for, and the element types that tensors
// are stored in. Everything has internal linkage, because the kernels are compiled once for each
// instruction set and the linker must not share an AVX-512 function with a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace mmdcn {

// Storage of the 16-bit types; arithmetic on them is done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that elements of type T are accumulated in, and that coordinates come in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename AccumulatorOf<T>::type;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename E, int N>
struct VectorType {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <typename E, int N>
using vector_t = typename VectorType<E, N>::type;

// A register full of accumulators.
template <typename A>
using register_t = vector_t<A, kLanes<A>>;

template <typename V>
inline V load_bytes(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <typename To, typename From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  return load_bytes<To>(&value);
}

// IEEE half to single. The exponent of a half is rebiased by a multiplication, which also
// normalises the subnormal ones; infinities and NaNs get the exponent that marks them in a single.
// U is uint32_t or a vector of it, F float or a vector of it.
template <typename F, typename U>
inline F single_from_half(U half) {
  const U magnitude = (half & 0x7fffu) << 13;
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000u;
  return bit_cast<F>(((half & 0x7c00u) == 0x7c00u ? special : finite) | (half & 0x8000u) << 16);
}

inline double load(const double* source) { return *source; }
inline float load(const float* source) { return *source; }
inline float load(const BFloat16* source) {
  return bit_cast<float>(static_cast<uint32_t>(source->bits) << 16);
}
inline float load(const Half* source) {
  return single_from_half<float>(static_cast<uint32_t>(source->bits));
}

inline register_t<double> load_register(const double* source) {
  return load_bytes<register_t<double>>(source);
}
inline register_t<float> load_register(const float* source) {
  return load_bytes<register_t<float>>(source);
}
inline vector_t<uint32_t, kLanes<float>> widen(const uint16_t* source) {
  using Narrow = vector_t<uint16_t, kLanes<float>>;
  using Wide = vector_t<uint32_t, kLanes<float>>;
  return __builtin_convertvector(load_bytes<Narrow>(source), Wide);
}
inline register_t<float> load_register(const BFloat16* source) {
  return bit_cast<register_t<float>>(widen(&source->bits) << 16);
}
inline register_t<float> load_register(const Half* source) {
  return single_from_half<register_t<float>>(widen(&source->bits));
}

template <typename A>
inline void store_register(A* target, register_t<A> value) {
  std::memcpy(target, &value, sizeof(value));
}

// Rounding to nearest, ties to even.
inline void store(double* target, double value) { *target = value; }
inline void store(float* target, float value) { *target = value; }
inline void store(BFloat16* target, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) {
    target->bits = static_cast<uint16_t>(bits >> 16 | 0x40);  // A NaN stays one, and quiet.
  } else {
    target->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
inline void store(Half* target, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity.
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 1/2, whose last bit weighs 2^-24 as a subnormal half's does, rounds.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  target->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace mmdcn
