// Packs the instances of google/minimalloc, or synthetic training steps of any size, and says how well and how fast.
//   pack_bench FILE.csv [--capacity N] [--output OUT.csv] [--search N] [--threads N]
//   pack_bench --synthetic=N [--seed S] [--remat] [--chunks K] [--fused-update] [--capacity N] [--output OUT.csv] ...
// Columns: id, lower, upper (one past the last step), size, and optionally alignment.
// Exit codes: 0 packed; 2 usage; 3 does not fit the capacity; 4 bad file.

#include <chrono>
#include <cstdint>
#include <iostream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "bench/pack_synthetic.h"
#include "codegen/memory/arena_packer.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr absl::string_view kUsage =
    "usage: pack_bench FILE.csv [--capacity N] [--output OUT.csv] [--search N] [--threads N]\n"
    "       pack_bench --synthetic=N [--seed S] [--remat] [--chunks K] [--fused-update] [the same]\n";

struct Instance {
  std::string header;
  std::vector<std::string> rows;  // As read.
  std::vector<PackInterval> intervals;
  int64_t alignment = 1;
};

// Errors: InvalidArgument with the line number and the field.
absl::StatusOr<Instance> ParseCsv(absl::string_view text) {
  Instance instance;
  std::map<std::string, size_t> column;
  size_t columns = 0;
  std::set<int64_t> alignments;
  int64_t line_number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty()) continue;
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ',');
    const auto error = [&](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat("line ", line_number, ": ", what));
    };
    if (instance.header.empty()) {
      const std::map<std::string, std::string> names = {
          {"id", "id"},       {"buffer", "id"},   {"buffer_id", "id"}, {"lower", "lower"},        {"start", "lower"},
          {"begin", "lower"}, {"upper", "upper"}, {"size", "size"},    {"alignment", "alignment"}};
      for (size_t i = 0; i < fields.size(); ++i) {
        const std::string name(absl::StripAsciiWhitespace(fields[i]));
        const auto known = names.find(name);
        if (known == names.end()) {
          return error(absl::StrCat("column \"", name, "\" is not supported; use id, lower, upper, size, alignment"));
        }
        if (!column.emplace(known->second, i).second) return error(absl::StrCat("column \"", name, "\" appears twice"));
      }
      for (const char* name : {"id", "lower", "upper", "size"}) {
        if (column.count(name) == 0) return error(absl::StrCat("column \"", name, "\" is missing"));
      }
      columns = fields.size();
      instance.header = std::string(line);
      continue;
    }
    if (fields.size() != columns) {
      return error(absl::StrCat(fields.size(), " fields, the header has ", columns));
    }
    const auto number = [&](const char* name, int64_t least) -> absl::StatusOr<int64_t> {
      const absl::string_view field = absl::StripAsciiWhitespace(fields[column.at(name)]);
      int64_t value;
      if (!absl::SimpleAtoi(field, &value)) {
        return error(absl::StrCat(name, " \"", field, "\" is not a whole number of at most 63 bits"));
      }
      if (value < least) return error(absl::StrCat(name, " is ", value, "; it must be at least ", least));
      return value;
    };
    ASSIGN_OR_RETURN(const int64_t lower, number("lower", 0));
    ASSIGN_OR_RETURN(const int64_t upper, number("upper", 0));
    ASSIGN_OR_RETURN(const int64_t size, number("size", 0));
    if (upper <= lower) return error(absl::StrCat("upper is ", upper, "; it must be above lower, which is ", lower));
    if (column.count("alignment") > 0) {
      ASSIGN_OR_RETURN(const int64_t alignment, number("alignment", 1));
      alignments.insert(alignment);
    }
    instance.rows.emplace_back(line);
    instance.intervals.push_back({lower, upper - 1, size});
  }
  if (instance.header.empty()) return absl::InvalidArgumentError("line 1: no header; expected id,lower,upper,size");
  // One alignment for all: the largest, which serves those that divide it.
  if (!alignments.empty()) instance.alignment = *alignments.rbegin();
  for (const int64_t alignment : alignments) {
    if (instance.alignment % alignment != 0) {
      return absl::InvalidArgumentError(absl::StrCat("column \"alignment\": ", alignment, " does not divide ",
                                                     instance.alignment, "; mixed alignments are not supported"));
    }
  }
  return instance;
}

Instance Synthesize(const SyntheticOptions& options) {
  Instance instance;
  instance.header = "id,lower,upper,size";
  instance.intervals = SyntheticTraining(options);
  instance.alignment = 256;
  for (size_t i = 0; i < instance.intervals.size(); ++i) {
    const PackInterval& interval = instance.intervals[i];
    instance.rows.push_back(absl::StrCat(i, ",", interval.first, ",", interval.last + 1, ",", interval.size_bytes));
  }
  return instance;
}

int Usage(absl::string_view message) {
  std::cerr << "pack_bench: " << message << "\n" << kUsage;
  return 2;
}

int Main(int argc, char** argv) {
  std::string file, output;
  std::optional<int64_t> synthetic;
  SyntheticOptions generate;
  PackOptions options;
  options.search_limit = 500'000'000;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!absl::StartsWith(argument, "--")) {
      if (!file.empty()) return Usage(absl::StrCat("two files: ", file, " and ", argument));
      file = argument;
      continue;
    }
    if (argument == "--remat" || argument == "--fused-update") {
      (argument == "--remat" ? generate.remat : generate.fused_update) = true;
      continue;
    }
    const std::pair<std::string, std::string> parts = absl::StrSplit(argument, absl::MaxSplits('=', 1));
    const auto& [name, inline_value] = parts;
    std::string value = inline_value;
    if (argument.find('=') == std::string::npos) {
      if (i + 1 == argc) return Usage(absl::StrCat(name, ": a value is missing, or the flag is not known"));
      value = argv[++i];
    }
    if (name == "--output") {
      output = value;
      continue;
    }
    int64_t number;
    if (!absl::SimpleAtoi(value, &number) || number < 0) {
      return Usage(absl::StrCat(name, ": \"", value, "\" is not a number, or the flag is not known"));
    }
    if (name == "--capacity") {
      options.capacity = number;
    } else if (name == "--search") {
      options.search_limit = number;
    } else if (name == "--threads" && number >= 1 && number <= 256) {
      options.threads = static_cast<int>(number);
    } else if (name == "--synthetic" && number >= 1 && number <= 10'000'000) {
      synthetic = number;
    } else if (name == "--seed") {
      generate.seed = static_cast<uint64_t>(number);
    } else if (name == "--chunks" && number >= 1 && number <= 512) {
      generate.loss_chunks = number;
    } else {
      return Usage(absl::StrCat(name, "=", value, ": out of range, or the flag is not known"));
    }
  }
  if (file.empty() == !synthetic.has_value()) return Usage("one of FILE.csv and --synthetic=N is needed");

  Instance instance;
  if (synthetic.has_value()) {
    generate.buffers = *synthetic;
    instance = Synthesize(generate);
  } else {
    absl::StatusOr<std::string> text = ReadFile(file);
    absl::StatusOr<Instance> parsed = text.ok() ? ParseCsv(*text) : text.status();
    if (!parsed.ok()) {
      std::cerr << "pack_bench: " << file << ": " << parsed.status().message() << "\n";
      return 4;
    }
    instance = *std::move(parsed);
  }
  options.alignment = instance.alignment;
  const auto start = std::chrono::steady_clock::now();
  const absl::StatusOr<Packing> packing = PackArena(instance.intervals, options);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!packing.ok()) {
    std::cerr << "pack_bench: " << file << ": " << packing.status().message() << "\n";
    return 4;
  }
  const absl::Status check = CheckPacking(instance.intervals, packing->offsets, packing->height_bytes);
  if (!check.ok()) {
    std::cerr << "pack_bench: internal error: " << check.message() << "\n";
    return 1;
  }
  std::cout << absl::StrFormat(
      "%d buffers  height %d  lower bound %d  height/bound %.6f  proof %s  proved %d  work %d  %.4f s\n",
      instance.intervals.size(), packing->height_bytes, packing->lower_bound_bytes,
      packing->lower_bound_bytes == 0
          ? 1.0
          : static_cast<double>(packing->height_bytes) / static_cast<double>(packing->lower_bound_bytes),
      std::string(PackProofName(packing->proof)), packing->proved_bytes, packing->search_work, seconds);
  if (!output.empty()) {
    std::string text = absl::StrCat(instance.header, ",offset\n");
    for (size_t i = 0; i < instance.rows.size(); ++i) {
      absl::StrAppend(&text, instance.rows[i], ",", packing->offsets[i], "\n");
    }
    if (const absl::Status written = WriteFile(output, text); !written.ok()) {
      std::cerr << "pack_bench: " << written.message() << "\n";
      return 1;
    }
  }
  if (options.capacity.has_value() && packing->height_bytes > *options.capacity) {
    std::cerr << "pack_bench: does not fit in " << *options.capacity << " bytes: "
              << (packing->proved_bytes > *options.capacity ? "proved impossible"
                                                            : "none found within the search limit")
              << "\n";
    return 3;
  }
  return 0;
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) { return mt::Main(argc, argv); }
