#include "runtime/backend.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <iterator>

#include "ir/base/check.h"

namespace mt {

absl::StatusOr<std::byte*> Backend::AllocatePinned(int64_t bytes) {
  pinned_.push_back(std::make_unique<std::byte[]>(static_cast<size_t>(bytes)));
  return pinned_.back().get();
}

void Backend::Copy(Lane, void* to, const void* from, int64_t bytes) {
  CHECK(host_addressable());
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void Backend::HashGranules(const std::byte* from, int64_t bytes, absl::Span<uint64_t> hashes) {
  constexpr int64_t kPart = int64_t{1} << 20;
  std::vector<std::byte> part(static_cast<size_t>(std::min(kPart, bytes)));
  size_t hash = 0;
  for (int64_t done = 0; done < bytes; done += kPart) {
    const int64_t there = std::min(kPart, bytes - done);
    CopyToHost(part.data(), from + done, there);
    for (int64_t at = 0; at < there; at += kGranuleBytes) {
      hashes[hash++] = HashGranule(part.data() + at, std::min(kGranuleBytes, there - at));
    }
  }
}

std::vector<double> Backend::Time(int count, const std::function<void(int)>& run) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  times.reserve(static_cast<size_t>(count));
  Synchronize();
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < count; ++i) {
    run(i);
    Synchronize();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  return times;
}

uint64_t HashGranule(const std::byte* granule, int64_t bytes) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  uint64_t words[kGranuleBytes / 8] = {};
  std::memcpy(words, granule, static_cast<size_t>(bytes));
  for (size_t i = 0; i < std::size(words); i += 4) {
    for (size_t k = 0; k < 4; ++k) lanes[k] = std::rotl((lanes[k] ^ words[i + k]) * 0x9E3779B97F4A7C15u, 29);
  }
  return ((lanes[0] * 31 + lanes[1]) * 31 + lanes[2]) * 31 + lanes[3];
}

}  // namespace mt
