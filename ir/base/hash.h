// FNV-1a: the stable 64-bit hash of names (random keys) and of canonical text (fingerprints).
#ifndef MT_IR_BASE_HASH_H_
#define MT_IR_BASE_HASH_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace mt {

inline uint64_t Fnv1a(absl::string_view bytes, uint64_t hash = 0xcbf29ce484222325u) {
  for (const char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return hash;
}

}  // namespace mt

#endif  // MT_IR_BASE_HASH_H_
