// fuzz_params.cc - a libFuzzer target: random descriptors (sizes, strides, types, options), valid and not.
//
// Each input becomes one pnn_params. Tensors whose descriptor the fuzzer keeps honest get memory of just their extent,
// at the end or the beginning of a readable page; the library must then either refuse the call and write nothing, or
// run it within that memory and its workspace. Wild descriptors (nonsense sizes, strides, types, null pointers) go to
// pnn_workspace_size first, and to the pass only where they were refused, which must refuse them as well. Data are not
// fuzzed. Built with -DPNN_FUZZ=ON (see programs.cmake).
#include <cstdio>
#include <memory>

#include "tensor.h"

namespace pnn_test {
namespace {

// Takes values from the fuzzer's bytes; zeros when they are used up.
class Bytes {
 public:
  Bytes(const uint8_t *data, size_t size) : data_(data), size_(size) {}
  int64_t below(int64_t n) { return n <= 1 ? 0 : next() % n; }
  bool chance(int64_t one_in) { return below(one_in) == one_in - 1; }
  int64_t word() {
    uint64_t v = 0;
    for (int i = 0; i < 8; i++) v = v << 8 | static_cast<uint64_t>(next());
    return static_cast<int64_t>(v);
  }

 private:
  int64_t next() { return at_ < size_ ? data_[at_++] : 0; }
  const uint8_t *data_;
  size_t size_;
  size_t at_ = 0;
};

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "fuzz_params: %s\n", what);
  std::abort();
}

void run_in_threes(void *, int64_t count, void (*task)(void *, int64_t), void *argument) {
  for (int64_t offset = 2; offset >= 0; offset--) {
    for (int64_t i = offset; i < count; i += 3) task(argument, i);
  }
}

class Fuzz {
 public:
  Fuzz(const uint8_t *data, size_t size) : bytes_(data, size), random_(size) {}

  void run() {
    pnn_params_init(&p_);
    const pnn_dtype x = static_cast<pnn_dtype>(bytes_.below(4));
    const pnn_dtype w = x == PNN_FLOAT32 && bytes_.chance(3) ? static_cast<pnn_dtype>(2 + bytes_.below(2)) : x;
    const pnn_dtype s = x == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32;
    const pnn_dtype n = bytes_.chance(2) ? x : PNN_FLOAT32;
    const int64_t groups = 1 + bytes_.below(3);
    const int64_t B = bytes_.below(5), C = groups * bytes_.below(8), T = groups * bytes_.below(20),
                  M = 1 + bytes_.below(4);
    const int64_t H = bytes_.below(9), W = bytes_.below(70);
    p_.stride[0] = 1 + bytes_.below(3);
    p_.stride[1] = 1 + bytes_.below(3);
    p_.groups = groups;
    p_.masks = M;
    p_.noise = static_cast<pnn_noise>(bytes_.below(PNN_NOISE_COUNT));
    p_.shared_masks = static_cast<int32_t>(bytes_.below(2));
    p_.activation = static_cast<pnn_activation>(bytes_.below(PNN_ACTIVATION_COUNT));
    p_.level = static_cast<double>(bytes_.below(256)) / 64 - 2;
    p_.norm = static_cast<int32_t>(bytes_.below(2));
    p_.norm_training = static_cast<int32_t>(bytes_.below(2));
    p_.seed = &seed_;
    const int64_t h = H ? (H - 1) / p_.stride[0] + 1 : 0;
    const int64_t wd = W ? (W - 1) / p_.stride[1] + 1 : 0;
    const int64_t K = C * M;
    const int64_t mask_channels = bytes_.chance(2) ? 1 : C;
    const pnn_pass pass = static_cast<pnn_pass>(bytes_.below(2));

    input(p_.input, x, {B, C, H, W});
    input(p_.weight, w, {T, C / groups * M});
    if (bytes_.chance(2)) input(p_.bias, w, {T});
    if (p_.noise == PNN_NOISE_TENSOR) input(p_.mask, n, {mask_channels, M, H, W});
    if (p_.norm) {
      if (bytes_.chance(2)) input(p_.norm_weight, s, {K});
      if (bytes_.chance(2)) input(p_.norm_bias, s, {K});
      output(p_.mean, s, {K});
      output(p_.variance, s, {K});
    }
    if (pass == PNN_PASS_FORWARD) {
      output(p_.output, w, {B, T, h, wd});
    } else {
      input(p_.grad_output, w, {B, T, h, wd});
      if (bytes_.chance(2)) output(p_.grad_input, x, {B, C, H, W});
      if (bytes_.chance(2)) output(p_.grad_weight, w, {T, C / groups * M});
      if (bytes_.chance(2)) output(p_.grad_bias, w, {T});
      if (p_.noise == PNN_NOISE_TENSOR && bytes_.chance(2)) output(p_.grad_mask, n, {mask_channels, M, H, W});
      if (p_.norm && bytes_.chance(2)) output(p_.grad_norm_weight, s, {K});
      if (p_.norm && bytes_.chance(2)) output(p_.grad_norm_bias, s, {K});
    }
    const bool honest = !spoil();
    call(pass, honest);
    masks();
  }

 private:
  void input(pnn_tensor &slot, pnn_dtype type, std::vector<int64_t> size) { make(slot, type, std::move(size), 7); }
  void output(pnn_tensor &slot, pnn_dtype type, std::vector<int64_t> size) { make(slot, type, std::move(size), 6); }

  void make(pnn_tensor &slot, pnn_dtype type, std::vector<int64_t> size, int64_t layouts) {
    const LayoutKind kind = static_cast<LayoutKind>(bytes_.below(layouts));
    const Placement placement = bytes_.chance(2) ? Placement::kEndsAtPage : Placement::kBeginsAtPage;
    owned_.push_back(std::make_unique<Tensor>(type, std::move(size), kind, random_, placement, Poison::kLarge, 0));
    owned_.back()->fill([this] { return random_.uniform(); });
    slot = owned_.back()->view();
  }

  // Makes some descriptor wrong, or perhaps not; true where one was touched.
  bool spoil() {
    pnn_tensor *const slots[] = {&p_.input,         &p_.weight,      &p_.bias,      &p_.mask,      &p_.norm_weight,
                                 &p_.norm_bias,     &p_.mean,        &p_.variance,  &p_.output,    &p_.grad_output,
                                 &p_.grad_input,    &p_.grad_weight, &p_.grad_bias, &p_.grad_mask, &p_.grad_norm_weight,
                                 &p_.grad_norm_bias};
    int64_t spoiled = 0;
    for (int64_t times = bytes_.below(4); times > 0; times--, spoiled++) {
      pnn_tensor &t = *slots[bytes_.below(16)];
      const int64_t wild = bytes_.chance(2) ? bytes_.word() : bytes_.below(256) - 128;
      switch (bytes_.below(9)) {
        case 0: t.size[bytes_.below(4)] = wild; break;
        case 1: t.stride[bytes_.below(4)] = wild; break;
        case 2: t.dtype = static_cast<pnn_dtype>(static_cast<int32_t>(wild)); break;
        case 3: t.data = nullptr; break;
        case 4: t.data = slots[bytes_.below(16)]->data; break;
        case 5: p_.masks = wild; break;
        case 6: p_.stride[bytes_.below(2)] = wild; break;
        case 7: p_.groups = wild; break;
        default:
          // Enormous and consistent, to reach behind the first checks.
          for (pnn_tensor *u : slots) u->size[bytes_.below(4)] = wild;
      }
    }
    return spoiled > 0;
  }

  void call(pnn_pass pass, bool honest) {
    pnn_host host = {static_cast<int32_t>(1 + bytes_.below(5)), run_in_threes, nullptr};
    if (bytes_.chance(8)) host.threads = static_cast<int32_t>(bytes_.word());
    const pnn_host *chosen = bytes_.chance(2) ? &host : nullptr;
    size_t needed = 1;
    pnn_error error;
    const pnn_status asked = pnn_workspace_size(&p_, pass, chosen, &needed, &error);
    if (asked != error.status) fail("the status is not the error's");
    if ((asked == PNN_OK) != (error.message[0] == '\0')) fail("a message without an error, or the other way round");
    if (asked != PNN_OK && needed != 0) fail("bytes after an error");
    // A spoiled descriptor that was taken may describe memory that is not there.
    if (asked == PNN_OK && (!honest || needed > (size_t{1} << 26))) return;
    const bool short_of_one = asked == PNN_OK && needed > 0 && bytes_.chance(6);
    Memory workspace(asked == PNN_OK ? needed : 4096, Placement::kEndsAtPage);
    p_.workspace = workspace.begin();
    p_.workspace_bytes = workspace.size() - (short_of_one ? 1 : 0);
    const pnn_status status = (pass == PNN_PASS_FORWARD ? pnn_forward : pnn_backward)(&p_, chosen, &error);
    if (short_of_one ? status != PNN_ERROR_WORKSPACE : status != asked) fail("the pass and the question disagree");
    for (const auto &tensor : owned_) {
      if (status != PNN_OK ? !tensor->intact() : !tensor->intact_outside()) fail("written where nothing may be");
    }
  }

  void masks() {
    Tensor tensor(static_cast<pnn_dtype>(bytes_.below(4)),
                  {bytes_.below(4), bytes_.below(20), bytes_.below(5), bytes_.below(70)},
                  static_cast<LayoutKind>(bytes_.below(6)), random_, Placement::kEndsAtPage, Poison::kNan, 0);
    pnn_tensor view = tensor.view();
    if (bytes_.chance(3)) {
      view.size[bytes_.below(4)] = bytes_.word();
      const pnn_tensor saved = view;
      // Only what must be refused: too large for its memory either way.
      int64_t count = 1;
      bool large = false;
      for (int64_t s : saved.size) large |= __builtin_mul_overflow(count, s, &count) || s < 0;
      if (!large) return;
    }
    const pnn_status status = pnn_mask_fill(&view, static_cast<pnn_noise>(bytes_.below(6)),
                                            static_cast<int32_t>(bytes_.below(2)), &seed_, nullptr, nullptr);
    if (status != PNN_OK ? !tensor.intact() : !tensor.intact_outside()) fail("a mask written where nothing may be");
  }

  Bytes bytes_;
  Random random_;
  pnn_params p_;
  int64_t seed_ = 99;
  std::vector<std::unique_ptr<Tensor>> owned_;
};

}  // namespace
}  // namespace pnn_test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  pnn_test::Fuzz(data, size).run();
  return 0;
}
