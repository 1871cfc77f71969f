// Vectors of the widest registers that this file is compiled for, and the element types that
// tensors are stored in. Functions have internal linkage: the kernels are compiled once for each
// instruction set, and the linker must not replace the copy for one by the copy for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// ------------------------------------------------------------------------------ one element

inline double load(const double* source) { return *source; }
inline float load(const float* source) { return *source; }
inline float load(const BFloat16* source) {
  return bit_cast<float>(static_cast<uint32_t>(source->bits) << 16);
}
// The multiplication corrects the bias of the exponent, and normalises subnormal numbers as well.
// Infinities and NaNs keep their mantissa and get a float's exponent for them.
inline float load(const Half* source) {
  const uint32_t half = source->bits;
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bit_cast<float>(((half & 0x7c00u) == 0x7c00u ? special : finite) | (half & 0x8000u) << 16);
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
    // Below 2^-14 the half is subnormal, and its last bit weighs 2^-24, as that of 1/2 does in
    // float: adding 1/2 rounds to it.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  target->bits = static_cast<uint16_t>(sign | half);
}

// ------------------------------------------------------------------------------ one register

inline register_t<double> load_register(const double* source) {
  return load_bytes<register_t<double>>(source);
}
inline register_t<float> load_register(const float* source) {
  return load_bytes<register_t<float>>(source);
}
inline register_t<float> load_register(const BFloat16* source) {
  using Narrow = vector_t<uint16_t, kLanes<float>>;
  using Wide = vector_t<uint32_t, kLanes<float>>;
  return bit_cast<register_t<float>>(__builtin_convertvector(load_bytes<Narrow>(source), Wide)
                                     << 16);
}
inline register_t<float> load_register(const Half* source) {
#if defined(__AVX512F__)
  // Masked, as GCC 12 warns of an undefined value inside the plain one.
  return _mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(source));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_bytes<__m128i>(source));
#else
  register_t<float> value;
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = load(source + lane);
  return value;
#endif
}

inline void store_register(double* target, register_t<double> value) {
  std::memcpy(target, &value, sizeof(value));
}
inline void store_register(float* target, register_t<float> value) {
  std::memcpy(target, &value, sizeof(value));
}
inline void store_register(BFloat16* target, register_t<float> value) {
#ifdef __AVX512BF16__
  const __m256bh narrow = _mm512_cvtneps_pbh(value);
#else
  using Narrow = vector_t<uint16_t, kLanes<float>>;
  using Wide = vector_t<uint32_t, kLanes<float>>;
  const Wide bits = bit_cast<Wide>(value);
  const Wide rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Wide nan = bit_cast<Wide>(value != value);  // all ones where it is
  const Narrow narrow =
      __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), Narrow);
#endif
  std::memcpy(target, &narrow, sizeof(narrow));
}
inline void store_register(Half* target, register_t<float> value) {
#if defined(__AVX512F__)
  const __m256i narrow =
      _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) store(target + lane, value[lane]);
#endif
}
// Stores past the caches if a register is a whole cache line; `target` is then aligned to one.
template <typename A>
inline void stream_register(A* target, register_t<A> value) {
#ifdef __AVX512F__
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bit_cast<__m512i>(value));
#else
  store_register(target, value);
#endif
}
// Must be called before another thread may read what stream_register() has stored.
inline void finish_streams() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

// ------------------------------------------------------------------------------ transposition

// Interleaves the elements of two registers' lower halves, or of their upper halves.
template <int Upper, typename V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I % 2 * lanes + Upper * lanes / 2 + I / 2)...);
#else
  using Index = std::conditional_t<sizeof(V) / lanes == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b,
                           vector_t<Index, lanes>{(I % 2 * lanes + Upper * lanes / 2 + I / 2)...});
#endif
}

// Interleaves a register's lower half with its upper half.
template <typename V, int... I>
inline V interleave_halves(V a, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(a, a, (I % 2 * lanes / 2 + I / 2)...);
#else
  using Index = std::conditional_t<sizeof(V) / lanes == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, vector_t<Index, lanes>{(I % 2 * lanes / 2 + I / 2)...});
#endif
}

// Adds the lower half of each register to its upper one, with the two registers interleaved.
template <typename A>
inline register_t<A> fold(register_t<A> even, register_t<A> odd) {
  using Lanes = std::make_integer_sequence<int, kLanes<A>>;
  return interleave<0>(even, odd, Lanes{}) + interleave<1>(even, odd, Lanes{});
}

// The sums of the elements of as many registers as one has lanes, of which each two that follow one
// another are folded: lane k has the sum of number k. Elements are always added in the same order.
// In the recursion, only every `step`-th pair from `first` on is summed.
template <typename A, int first = 0, int step = 1>
inline register_t<A> sums_of(const register_t<A> (&pairs)[kLanes<A> / 2]) {
  constexpr int lanes = kLanes<A>;
  if constexpr (2 * step == lanes) {
    return pairs[first];
  } else {
    const register_t<A> sums =
        fold<A>(sums_of<A, first, 2 * step>(pairs), sums_of<A, first + step, 2 * step>(pairs));
    if constexpr (step > 1) return sums;
    // The first of all pairs are in the lower half, and the second ones in the upper half.
    return interleave_halves(sums, std::make_integer_sequence<int, lanes>{});
  }
}

// Transposes a square of registers. Each round moves the highest bit of the column index to the
// lowest bit of the row index, and the highest bit of the row index to the lowest of the column's.
template <typename A>
inline void transpose_square(register_t<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  using Lanes = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    register_t<A> mixed[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + lanes / 2], Lanes{});
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + lanes / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = mixed[i];
  }
}

}  // namespace
}  // namespace mmdcn
