// How the operators refuse arguments. The messages say what was seen and what is accepted; they reach Python as
// RuntimeError, the only exception that every PyTorch hands through.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace vjepa_fast {

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  check(low <= value && value <= high, name, " is ", value, "; expected ", low, " to ", high);
}

}  // namespace vjepa_fast
