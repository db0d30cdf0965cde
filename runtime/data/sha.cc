#include "runtime/data/sha.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/status_macros.h"
#include "runtime/data/mapped_file.h"

namespace mt {
namespace {

constexpr size_t kBlockBytes = 64;

uint32_t RotateLeft(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }
uint32_t RotateRight(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

uint32_t BigEndian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
}

// Calls block(p) for each whole block of `rest` and `bytes`; what is left stays in `rest`.
template <typename Block>
void Blocks(absl::string_view bytes, std::string* rest, const Block& block) {
  const auto at = [](absl::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); };
  if (!rest->empty()) {
    const size_t count = std::min(bytes.size(), kBlockBytes - rest->size());
    rest->append(bytes.data(), count);
    bytes.remove_prefix(count);
    if (rest->size() < kBlockBytes) return;
    block(at(*rest));
    rest->clear();
  }
  for (; bytes.size() >= kBlockBytes; bytes.remove_prefix(kBlockBytes)) block(at(bytes));
  rest->assign(bytes.data(), bytes.size());
}

// What follows the bytes, so that whole blocks come of it.
std::string Padding(uint64_t size_bytes) {
  std::string padding("\x80");
  while ((size_bytes + padding.size()) % kBlockBytes != kBlockBytes - 8) padding.push_back('\0');
  for (int shift = 56; shift >= 0; shift -= 8) padding.push_back(static_cast<char>(8 * size_bytes >> shift));
  return padding;
}

template <size_t n>
std::string Digits(const std::array<uint32_t, n>& state) {
  std::string hex;
  for (const uint32_t word : state) absl::StrAppendFormat(&hex, "%08x", word);
  return hex;
}

constexpr uint32_t kSha256Constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

template <typename Hash>
absl::StatusOr<std::string> HashFile(const std::string& path, bool git_blob) {
  ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  Hash hash;
  if (git_blob) hash.Update(absl::StrCat("blob ", file->bytes().size(), absl::string_view("\0", 1)));
  constexpr size_t kPart = size_t{1} << 22;
  for (size_t at = 0; at < file->bytes().size(); at += kPart) {
    hash.Update(file->bytes().substr(at, kPart));
    file->Release(0, static_cast<int64_t>(at));
  }
  return hash.Hex();
}

}  // namespace

void Sha1::Update(absl::string_view bytes) {
  size_bytes_ += bytes.size();
  Blocks(bytes, &rest_, [this](const uint8_t* block) { Block(block); });
}

std::string Sha1::Hex() {
  Update(Padding(size_bytes_));
  return Digits(state_);
}

// Section 6.1.2.
void Sha1::Block(const uint8_t* block) {
  std::array<uint32_t, 80> w;
  for (size_t t = 0; t < 16; ++t) w[t] = BigEndian(block + 4 * t);
  for (size_t t = 16; t < 80; ++t) w[t] = RotateLeft(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);
  auto [a, b, c, d, e] = state_;
  for (size_t t = 0; t < 80; ++t) {
    const uint32_t f = t < 20   ? ((b & c) ^ (~b & d)) + 0x5A827999
                       : t < 40 ? (b ^ c ^ d) + 0x6ED9EBA1
                       : t < 60 ? ((b & c) ^ (b & d) ^ (c & d)) + 0x8F1BBCDC
                                : (b ^ c ^ d) + 0xCA62C1D6;
    const uint32_t next = RotateLeft(a, 5) + f + e + w[t];
    e = d;
    d = c;
    c = RotateLeft(b, 30);
    b = a;
    a = next;
  }
  const std::array<uint32_t, 5> added = {a, b, c, d, e};
  for (size_t i = 0; i < added.size(); ++i) state_[i] += added[i];
}

void Sha256::Update(absl::string_view bytes) {
  size_bytes_ += bytes.size();
  Blocks(bytes, &rest_, [this](const uint8_t* block) { Block(block); });
}

std::string Sha256::Hex() {
  Update(Padding(size_bytes_));
  return Digits(state_);
}

// Section 6.2.2.
void Sha256::Block(const uint8_t* block) {
  std::array<uint32_t, 64> w;
  for (size_t t = 0; t < 16; ++t) w[t] = BigEndian(block + 4 * t);
  for (size_t t = 16; t < 64; ++t) {
    const uint32_t s0 = RotateRight(w[t - 15], 7) ^ RotateRight(w[t - 15], 18) ^ w[t - 15] >> 3;
    const uint32_t s1 = RotateRight(w[t - 2], 17) ^ RotateRight(w[t - 2], 19) ^ w[t - 2] >> 10;
    w[t] = s1 + w[t - 7] + s0 + w[t - 16];
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (size_t t = 0; t < 64; ++t) {
    const uint32_t sum1 = RotateRight(e, 6) ^ RotateRight(e, 11) ^ RotateRight(e, 25);
    const uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kSha256Constants[t] + w[t];
    const uint32_t sum0 = RotateRight(a, 2) ^ RotateRight(a, 13) ^ RotateRight(a, 22);
    const uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  const std::array<uint32_t, 8> added = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < added.size(); ++i) state_[i] += added[i];
}

absl::StatusOr<std::string> FileSha256(const std::string& path) { return HashFile<Sha256>(path, /*git_blob=*/false); }

absl::StatusOr<std::string> FileGitBlob(const std::string& path) { return HashFile<Sha1>(path, /*git_blob=*/true); }

}  // namespace mt
