// settings.cpp - the settings of settings.h.
#include "settings.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

std::atomic<bool>& tf32() {
  static std::atomic<bool> allowed([] {
    const char* value = std::getenv("TORCH_PNN_ALLOW_TF32");
    return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
  }());
  return allowed;
}

}  // namespace

bool torch_pnn_tf32_allowed() { return tf32(); }
void torch_pnn_allow_tf32(bool allowed) { tf32() = allowed; }
