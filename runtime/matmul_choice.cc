#include "runtime/matmul_choice.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

constexpr int64_t kFormat = 1;
constexpr int64_t kMaxFileBytes = int64_t{16} << 20;
// A file with more begins anew.
constexpr size_t kMaxEntries = 4096;
constexpr size_t kMaxProblemBytes = 1024, kMaxAlgorithmBytes = 256;

constexpr double kWorthFinal = 1.2;  // Of the fastest; slower ones are not timed again.
constexpr size_t kFinalists = 6;
constexpr int kRounds = 3, kRunsOfRound = 2;
constexpr double kWorthChange = 0.99;

}  // namespace

size_t ChooseMatmul(size_t count, MatmulTrials& device, std::vector<MatmulTrial>* trials) {
  CHECK(count >= 1);
  const bool all = trials != nullptr;
  std::vector<MatmulTrial> unused;
  if (trials == nullptr) trials = &unused;
  trials->assign(count, {});
  const absl::StatusOr<uint64_t> first = device.Digest(0);
  if (!first.ok()) return 0;
  std::vector<size_t> finalists;
  for (size_t i = 0; i < count; ++i) {
    MatmulTrial& trial = (*trials)[i];
    const absl::StatusOr<uint64_t> digest = i == 0 ? first : device.Digest(i);
    trial.same_bits = digest.ok() && *digest == *first;
    if (!digest.ok() || (!trial.same_bits && !all)) continue;
    const absl::StatusOr<double> seconds = device.Seconds(i, 1);
    if (!seconds.ok()) continue;
    trial.seconds = *seconds;
    if (trial.same_bits) finalists.push_back(i);
  }
  if (finalists.size() < 2 || finalists[0] != 0) return 0;
  // The first stays, whatever its one run took.
  const auto faster = [&](size_t a, size_t b) { return (*trials)[a].seconds < (*trials)[b].seconds; };
  std::stable_sort(finalists.begin() + 1, finalists.end(), faster);
  const double limit = kWorthFinal * std::min((*trials)[0].seconds, (*trials)[finalists[1]].seconds);
  while (finalists.size() > kFinalists || (finalists.size() > 1 && (*trials)[finalists.back()].seconds > limit)) {
    finalists.pop_back();
  }
  if (finalists.size() == 1) return 0;
  std::vector<double> best(count, 0);
  for (int round = 0; round < kRounds; ++round) {
    for (const size_t i : finalists) {
      const absl::StatusOr<double> seconds = device.Seconds(i, kRunsOfRound);
      if (!seconds.ok()) return 0;
      best[i] = round == 0 ? *seconds : std::min(best[i], *seconds);
    }
  }
  size_t chosen = 0;
  for (const size_t i : finalists) {
    (*trials)[i].seconds = best[i];
    if (best[i] < best[chosen]) chosen = i;
  }
  return best[chosen] <= kWorthChange * best[0] ? chosen : 0;
}

MatmulCache::MatmulCache(std::string path) : path_(std::move(path)) {
  if (path_.empty()) return;
  absl::StatusOr<Entries> entries = Read(path_);
  if (entries.ok()) {
    entries_ = *std::move(entries);
  } else if (!absl::IsNotFound(entries.status())) {
    warned_ = true;
    warnings_.push_back(absl::StrCat("the remembered matmul algorithms in ", path_, " are not used: the file ",
                                     entries.status().message()));
  }
}

absl::StatusOr<MatmulCache::Entries> MatmulCache::Read(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  ASSIGN_OR_RETURN(const nlohmann::json json, ParseStrictJson(text));
  const auto format = json.find("format"), algorithms = json.find("algorithms");
  if (format == json.end() || *format != kFormat || algorithms == json.end() || !algorithms->is_object()) {
    return absl::FailedPreconditionError(absl::StrCat("is no cache of format ", kFormat));
  }
  Entries entries;
  if (algorithms->size() > kMaxEntries) return entries;
  for (const auto& [problem, value] : algorithms->items()) {
    const std::string* hex = value.get_ptr<const std::string*>();
    const bool is_hex = hex != nullptr && !hex->empty() && hex->size() % 2 == 0 &&
                        hex->size() <= 2 * kMaxAlgorithmBytes && std::all_of(hex->begin(), hex->end(), [](char c) {
                          return absl::ascii_isxdigit(static_cast<unsigned char>(c));
                        });
    if (!is_hex || problem.size() > kMaxProblemBytes) {
      return absl::FailedPreconditionError(
          absl::StrCat("has no algorithm in hexadecimal at \"", problem.substr(0, 100), "\""));
    }
    entries[problem] = absl::HexStringToBytes(*hex);
  }
  return entries;
}

const std::string* MatmulCache::Find(const std::string& problem) const {
  const auto at = entries_.find(problem);
  return at == entries_.end() ? nullptr : &at->second;
}

void MatmulCache::Put(const std::string& problem, std::string algorithm) {
  entries_[problem] = algorithm;
  added_[problem] = std::move(algorithm);
}

void MatmulCache::Save() {
  if (added_.empty() || path_.empty()) return;
  Entries all = added_;
  if (absl::StatusOr<Entries> others = Read(path_); others.ok() && others->size() + all.size() <= kMaxEntries) {
    all.insert(others->begin(), others->end());
  }
  added_.clear();
  nlohmann::ordered_json json = {{"format", kFormat}, {"algorithms", nlohmann::ordered_json::object()}};
  for (const auto& [problem, algorithm] : all) json["algorithms"][problem] = absl::BytesToHexString(algorithm);
  const size_t slash = path_.rfind('/');
  absl::Status written = slash == std::string::npos ? absl::OkStatus() : MakeFolder(path_.substr(0, slash));
  if (written.ok()) {
    written = WriteFile(path_, absl::StrCat(json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace), "\n"));
  }
  if (!written.ok() && !warned_) {
    warnings_.push_back(absl::StrCat("chosen matmul algorithms are not remembered: ", written.message()));
  }
}

std::vector<std::string> MatmulCache::TakeWarnings() { return std::exchange(warnings_, {}); }

}  // namespace mt
