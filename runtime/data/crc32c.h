// CRC-32C (Castagnoli), the checksum of all own binary files.
#ifndef MT_RUNTIME_DATA_CRC32C_H_
#define MT_RUNTIME_DATA_CRC32C_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace mt {

// Of `bytes`; `crc` continues an earlier result. Crc32c("123456789") is 0xE3069283 (RFC 3720, appendix B.4).
uint32_t Crc32c(absl::string_view bytes, uint32_t crc = 0);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_CRC32C_H_
