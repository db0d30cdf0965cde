// Encodes a file with a tokenizer and prints one JSON line: bytes, tokens, megabytes a second on one core. The file is
// cut into texts at NUL bytes (a file without one is one text). With --ids the tokens go to a file as little-endian
// i32, each text's followed by -1: what tokenizer_peer.py compares with the libraries of others.
//   tokenizer_bench TOKENIZER FILE [--ids=FILE] [--save=FILE]      --save: the tokenizer as it is kept beside a corpus
#include <time.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "runtime/data/tokenizer_files.h"

namespace mt {
namespace {

// Of this thread: a busy machine does not change what is measured.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

absl::Status Run(const std::vector<std::string>& args) {
  std::vector<std::string> paths;
  std::string ids_path;
  std::string save_path;
  for (const std::string& arg : args) {
    absl::string_view value = arg;
    if (absl::ConsumePrefix(&value, "--ids=")) {
      ids_path = std::string(value);
    } else if (absl::ConsumePrefix(&value, "--save=")) {
      save_path = std::string(value);
    } else {
      paths.push_back(arg);
    }
  }
  if (paths.size() != 2) return absl::InvalidArgumentError("usage: tokenizer_bench TOKENIZER FILE [--ids=FILE]");
  ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, OpenTokenizer(paths[0]));
  if (!save_path.empty()) RETURN_IF_ERROR(WriteFile(save_path, tokenizer->Serialize()));
  ASSIGN_OR_RETURN(const std::string text, ReadFile(paths[1]));
  const std::vector<absl::string_view> texts = absl::StrSplit(text, '\0');
  std::vector<int32_t> all;
  std::vector<int32_t> ids;
  int64_t tokens = 0;
  double seconds = 0;
  for (const absl::string_view part : texts) {
    ids.clear();
    const double start = CpuSeconds();
    tokenizer->Encode(part, &ids);
    seconds += CpuSeconds() - start;
    tokens += static_cast<int64_t>(ids.size());
    if (ids_path.empty()) continue;
    all.insert(all.end(), ids.begin(), ids.end());
    all.push_back(-1);
  }
  const nlohmann::ordered_json line = {{"tokenizer", tokenizer->name()},
                                       {"bytes", text.size()},
                                       {"texts", texts.size()},
                                       {"tokens", tokens},
                                       {"megabytes_per_second", static_cast<double>(text.size()) / seconds / 1e6}};
  std::printf("%s\n", line.dump().c_str());
  if (ids_path.empty()) return absl::OkStatus();
  return WriteFile(ids_path, absl::string_view(reinterpret_cast<const char*>(all.data()), all.size() * 4));
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const absl::Status status = mt::Run(std::vector<std::string>(argv + 1, argv + argc));
  if (!status.ok()) std::fprintf(stderr, "error: %s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}
