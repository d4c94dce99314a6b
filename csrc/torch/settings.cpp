// settings.cpp - the settings of settings.h.
#include "settings.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

// By an environment variable that is not empty: "0" forbids, anything else allows.
bool environment_allows(const char* variable, bool otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : std::strcmp(value, "0") != 0;
}
std::atomic<bool>& tf32() {
  static std::atomic<bool> allowed(environment_allows("TORCH_PNN_ALLOW_TF32", false));
  return allowed;
}
std::atomic<bool>& wgmma() {
  static std::atomic<bool> allowed(environment_allows("TORCH_PNN_ALLOW_WGMMA", true));
  return allowed;
}

}  // namespace

bool torch_pnn_tf32_allowed() { return tf32(); }
void torch_pnn_allow_tf32(bool allowed) { tf32() = allowed; }
bool torch_pnn_wgmma_allowed() { return wgmma(); }
void torch_pnn_allow_wgmma(bool allowed) { wgmma() = allowed; }
