// tensor.h - tensors for the tests: any element type, any strides, and memory that shows every stray read and write.
//
// A Tensor owns its memory. Around the elements, and in the gaps between strided ones, stands poison: a NaN (an
// over-read that enters a sum shows) or a large finite value (ReLU may swallow a NaN), and seal()/intact() find writes
// outside the elements. With Placement::kEndsAtPage or kBeginsAtPage the memory touches a page that cannot be read.
#ifndef PNN_TESTS_TENSOR_H
#define PNN_TESTS_TENSOR_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "pnn/pnn.h"

namespace pnn_test {

// ---- random numbers -------------------------------------------------------------------------------------------------

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): integer arithmetic alone, so that test data are the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // An integer in [low, high].
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % (static_cast<uint64_t>(high - low) + 1));
  }
  // A multiple of 2^-52 in [-1, 1).
  double uniform() { return std::ldexp(static_cast<double>(static_cast<int64_t>(bits()) >> 11), -52); }
  bool flip() { return (bits() & 1) != 0; }
  template <class T>
  const T &pick(const std::vector<T> &list) {
    return list[static_cast<size_t>(integer(0, static_cast<int64_t>(list.size()) - 1))];
  }

 private:
  uint64_t state_;
};

// ---- element types --------------------------------------------------------------------------------------------------

struct Format {
  int precision;  // significant bits
  int low;        // exponent of the smallest normal number
  int high;       // exponent of the largest
};

inline Format format_of(pnn_dtype type) {
  switch (type) {
    case PNN_FLOAT64: return {53, -1022, 1023};
    case PNN_BFLOAT16: return {8, -126, 127};
    case PNN_FLOAT16: return {11, -14, 15};
    default: return {24, -126, 127};
  }
}

inline size_t bytes_of(pnn_dtype type) { return type == PNN_FLOAT64 ? 8 : type == PNN_FLOAT32 ? 4 : 2; }
inline bool is_half(pnn_dtype type) { return type == PNN_BFLOAT16 || type == PNN_FLOAT16; }
inline const char *name_of(pnn_dtype type) {
  static const char *const names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[type];
}

// Half the distance between 1 and the next number: the largest relative error of one rounding.
inline double unit_of(pnn_dtype type) { return std::ldexp(1.0, -format_of(type).precision); }

// Half the distance between the smallest numbers: the largest error of one rounding where numbers are denormal.
inline long double tiny_of(pnn_dtype type) { return std::ldexp(1.0L, format_of(type).low - format_of(type).precision); }

// x rounded once, to nearest even, with gradual underflow.
template <class R>
R round_to(pnn_dtype type, R x) {
  if (type == PNN_FLOAT64) return static_cast<R>(static_cast<double>(x));
  if (type == PNN_FLOAT32) return static_cast<R>(static_cast<float>(x));
  if (x == 0 || !std::isfinite(x)) return x;
  const Format f = format_of(type);
  const int unit = std::max(std::ilogb(x), f.low) - (f.precision - 1);
  const R rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  const R limit = std::ldexp(static_cast<R>(1), f.high + 1);
  if (std::fabs(rounded) >= limit) return std::copysign(std::numeric_limits<R>::infinity(), x);
  return rounded;
}

inline double load(pnn_dtype type, const void *at) {
  if (type == PNN_FLOAT64) {
    double v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
  if (type == PNN_FLOAT32) {
    float v;
    std::memcpy(&v, at, sizeof v);
    return static_cast<double>(v);
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  if (type == PNN_BFLOAT16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &wide, sizeof v);
    return static_cast<double>(v);
  }
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<double>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<double>(fraction + 1024), exponent - 25);
  }
  return (bits & 0x8000) ? -magnitude : magnitude;
}

// Stores x, rounded once.
template <class R>
void store(pnn_dtype type, void *at, R value) {
  const double x = static_cast<double>(round_to(type, value));
  if (type == PNN_FLOAT64) {
    std::memcpy(at, &x, sizeof x);
    return;
  }
  if (type == PNN_FLOAT32) {
    const float v = static_cast<float>(x);
    std::memcpy(at, &v, sizeof v);
    return;
  }
  uint16_t bits;
  if (type == PNN_BFLOAT16) {
    const float v = static_cast<float>(x);
    uint32_t wide;
    std::memcpy(&wide, &v, sizeof wide);
    bits = static_cast<uint16_t>(wide >> 16);
    if (std::isnan(v)) bits = 0x7fc0;
  } else {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double m = std::fabs(x);
    if (std::isnan(x)) {
      bits = 0x7e00;
    } else if (std::isinf(x)) {
      bits = static_cast<uint16_t>(sign | 0x7c00);
    } else if (m < std::ldexp(1.0, -14)) {
      bits = static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(m, 24)));
    } else {
      const int e = std::ilogb(m);
      const int fraction = static_cast<int>(std::ldexp(m, 10 - e)) - 1024;
      bits = static_cast<uint16_t>(sign | ((e + 15) << 10) | fraction);
    }
  }
  std::memcpy(at, &bits, sizeof bits);
}

// ---- layouts --------------------------------------------------------------------------------------------------------

enum class LayoutKind {
  kContiguous,
  kChannelsLast,  // dimension 1 innermost
  kPermuted,      // a random order of the dimensions
  kSliced,        // a crop of a larger contiguous tensor
  kPrime,         // every stride a prime, random order
  kNegative,      // random order, some strides negative
  kBroadcast,     // some strides zero (inputs only)
};

inline const std::vector<LayoutKind> &input_layouts() {
  static const std::vector<LayoutKind> list = {
      LayoutKind::kContiguous, LayoutKind::kChannelsLast, LayoutKind::kPermuted, LayoutKind::kSliced,
      LayoutKind::kPrime,      LayoutKind::kNegative,     LayoutKind::kBroadcast};
  return list;
}

inline const std::vector<LayoutKind> &output_layouts() {
  static const std::vector<LayoutKind> list(input_layouts().begin(), input_layouts().end() - 1);
  return list;
}

inline const char *name_of(LayoutKind kind) {
  static const char *const names[] = {"contiguous", "channels_last", "permuted", "sliced",
                                      "prime",      "negative",      "broadcast"};
  return names[static_cast<int>(kind)];
}

enum class Placement {
  kZones,         // heap memory with wide poisoned zones on both sides
  kHeap,          // heap memory of exactly the elements' extent, for the address sanitizer
  kEndsAtPage,    // the last element is followed by an unreadable page
  kBeginsAtPage,  // the first element is preceded by one
};

enum class Poison { kNan, kLarge };

inline int64_t next_prime(int64_t n) {
  for (n = std::max<int64_t>(n, 2);; n++) {
    bool prime = true;
    for (int64_t d = 2; d * d <= n && prime; d++) prime = n % d != 0;
    if (prime) return n;
  }
}

// Bytes of memory beside an unreadable page, or on the heap.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, Placement placement) : bytes_(bytes) {
    if (placement == Placement::kEndsAtPage || placement == Placement::kBeginsAtPage) {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t inner = (bytes + page - 1) / page * page;
      mapped_ = inner + 2 * page;
      void *base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base == MAP_FAILED) throw std::runtime_error("mmap failed");
      base_ = static_cast<unsigned char *>(base);
      if (inner > 0 && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) {
        throw std::runtime_error("mprotect failed");
      }
      begin_ = placement == Placement::kEndsAtPage ? base_ + page + inner - bytes : base_ + page;
    } else {
      base_ = static_cast<unsigned char *>(std::malloc(std::max<size_t>(bytes, 1)));
      if (base_ == nullptr) throw std::bad_alloc();
      begin_ = base_;
    }
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  Memory(Memory &&other) noexcept { *this = std::move(other); }
  Memory &operator=(Memory &&other) noexcept {
    std::swap(base_, other.base_);
    std::swap(begin_, other.begin_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Memory() {
    if (mapped_ > 0) {
      munmap(base_, mapped_);
    } else {
      std::free(base_);
    }
  }
  unsigned char *begin() const { return begin_; }
  size_t size() const { return bytes_; }

 private:
  unsigned char *base_ = nullptr;
  unsigned char *begin_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_ = 0;
};

// ---- tensors --------------------------------------------------------------------------------------------------------

class Tensor {
 public:
  Tensor() = default;

  // `offset` shifts the elements by 0 to 15 of them, against any alignment (with Placement::kZones).
  Tensor(pnn_dtype type, std::vector<int64_t> size, LayoutKind kind, Random &random, Placement placement, Poison poison,
         int64_t offset) {
    view_ = {};
    view_.dtype = type;
    const int rank = static_cast<int>(size.size());
    for (int d = 0; d < 4; d++) view_.size[d] = d < rank ? size[static_cast<size_t>(d)] : 1;
    layout(kind, rank, random);
    int64_t low = 0;
    int64_t high = 0;  // extent of the elements, relative to the first
    bool empty = false;
    for (int d = 0; d < 4; d++) empty = empty || view_.size[d] == 0;
    for (int d = 0; d < 4 && !empty; d++) {
      if (view_.size[d] == 1) continue;
      const int64_t reach = (view_.size[d] - 1) * view_.stride[d];
      (reach < 0 ? low : high) += reach;
    }
    const int64_t span = empty ? 0 : high - low + 1;
    const int64_t zone = placement == Placement::kZones ? 96 : 0;
    if (zone == 0) offset = 0;
    const size_t element = bytes_of(type);
    memory_ = Memory(static_cast<size_t>(span + 2 * zone + offset) * element, placement);
    first_ = zone + offset - low;
    view_.data = memory_.begin() + first_ * static_cast<int64_t>(element);
    fill_poison(poison);
    if (!empty) list_offsets();
    seal();
  }

  const pnn_tensor &view() const { return view_; }
  pnn_dtype type() const { return view_.dtype; }
  int64_t count() const { return static_cast<int64_t>(offsets_.size()); }
  bool present() const { return view_.data != nullptr; }

  // The elements in row-major order of their indices.
  std::vector<double> values() const {
    std::vector<double> result;
    result.reserve(offsets_.size());
    for (int64_t o : offsets_) result.push_back(load(view_.dtype, at(o)));
    return result;
  }
  double value(int64_t i) const { return load(view_.dtype, at(offsets_[static_cast<size_t>(i)])); }
  void set(int64_t i, double x) { store(view_.dtype, at(offsets_[static_cast<size_t>(i)]), x); }

  // Calls make() for each element in row-major order and stores what it returns.
  template <class Make>
  void fill(Make make) {
    for (int64_t o : offsets_) store(view_.dtype, at(o), make());
    seal();
  }

  // The elements' bits, in row-major order; every NaN as the same bits.
  std::vector<uint64_t> bits() const {
    std::vector<uint64_t> result;
    result.reserve(offsets_.size());
    for (int64_t o : offsets_) {
      uint64_t b = 0;
      std::memcpy(&b, at(o), bytes_of(view_.dtype));
      if (std::isnan(load(view_.dtype, at(o)))) b = ~uint64_t{0};
      result.push_back(b);
    }
    return result;
  }

  // Remembers every byte; intact() then tells whether any changed, and intact_outside() whether any changed that does
  // not belong to an element.
  void seal() { sealed_.assign(memory_.begin(), memory_.begin() + memory_.size()); }
  bool intact() const {
    return memory_.size() == 0 || std::memcmp(sealed_.data(), memory_.begin(), memory_.size()) == 0;
  }
  bool intact_outside() const {
    if (memory_.size() == 0) return true;
    std::vector<unsigned char> expected = sealed_;
    const int64_t element = static_cast<int64_t>(bytes_of(view_.dtype));
    for (int64_t o : offsets_) {
      std::memcpy(expected.data() + (first_ + o) * element, at(o), static_cast<size_t>(element));
    }
    return std::memcmp(expected.data(), memory_.begin(), memory_.size()) == 0;
  }

  void fill_poison(Poison poison) {
    const size_t element = bytes_of(view_.dtype);
    const double large = view_.dtype == PNN_FLOAT16 ? 60000.0 : view_.dtype == PNN_FLOAT64 ? 1e300 : 3e38;
    const double value = poison == Poison::kNan ? std::numeric_limits<double>::quiet_NaN() : large;
    for (size_t i = 0; i + element <= memory_.size(); i += element) store(view_.dtype, memory_.begin() + i, value);
  }

 private:
  unsigned char *at(int64_t offset) const {
    return memory_.begin() + (first_ + offset) * static_cast<int64_t>(bytes_of(view_.dtype));
  }

  void layout(LayoutKind kind, int rank, Random &random) {
    std::vector<int> order;  // innermost first
    for (int d = rank - 1; d >= 0; d--) order.push_back(d);
    if (kind == LayoutKind::kChannelsLast && rank >= 2) {
      order.erase(std::find(order.begin(), order.end(), 1));
      order.insert(order.begin(), 1);
    }
    if (kind == LayoutKind::kPermuted || kind == LayoutKind::kPrime || kind == LayoutKind::kNegative ||
        kind == LayoutKind::kBroadcast) {
      for (size_t i = order.size(); i > 1; i--) {
        std::swap(order[i - 1], order[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i) - 1))]);
      }
    }
    int64_t running = 1;
    for (int d : order) {
      const int64_t size = view_.size[d];
      int64_t stride = running;
      if (kind == LayoutKind::kPrime) stride = next_prime(running);
      if (kind == LayoutKind::kBroadcast && random.flip()) {
        view_.stride[d] = 0;
        continue;
      }
      int64_t extent = std::max<int64_t>(size, 1);
      if (kind == LayoutKind::kSliced) extent += random.integer(0, 3);
      running = stride * (extent - 1) + running;
      const bool negative = kind == LayoutKind::kNegative && random.flip();
      view_.stride[d] = negative ? -stride : stride;
      // Strides of sizes 0 and 1 are never read: say so with nonsense.
      if (size <= 1 && kind != LayoutKind::kContiguous) view_.stride[d] = unread(random);
    }
    for (int d = rank; d < 4; d++) view_.stride[d] = unread(random);
    for (int d = 0; d < 4; d++) {
      if (view_.size[d] <= 1) continue;
      if (view_.stride[d] == kUnread) throw std::logic_error("a stride was forgotten");
    }
  }

  static int64_t unread(Random &random) { return random.flip() ? kUnread : std::numeric_limits<int64_t>::min(); }

  void list_offsets() {
    const auto step = [this](int d) { return view_.size[d] > 1 ? view_.stride[d] : 0; };
    for (int64_t i = 0; i < view_.size[0]; i++) {
      for (int64_t j = 0; j < view_.size[1]; j++) {
        for (int64_t k = 0; k < view_.size[2]; k++) {
          for (int64_t l = 0; l < view_.size[3]; l++) {
            offsets_.push_back(i * step(0) + j * step(1) + k * step(2) + l * step(3));
          }
        }
      }
    }
  }

  static constexpr int64_t kUnread = std::numeric_limits<int64_t>::max();

  pnn_tensor view_ = {};
  Memory memory_;
  int64_t first_ = 0;  // the element at index 0, counted from the memory's begin
  std::vector<int64_t> offsets_;
  std::vector<unsigned char> sealed_;
};

}  // namespace pnn_test

#endif
