// Keeps the tree in order: who may include whom, what the top level holds, and what no file may contain.
#include <fnmatch.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

// Folder -> what it may include of ours; a name stands for the folder and all below it. The longest folder that holds a
// file speaks for it. tests and bench may include anything.
const std::map<std::string, std::vector<std::string>>& Layers() {
  static const auto& layers = *new std::map<std::string, std::vector<std::string>>{
      {"ir/base", {"ir/base"}},
      {"ir", {"proto", "ir"}},
      {"passes", {"proto", "ir", "passes"}},
      {"models", {"proto", "ir", "models"}},
      {"codegen/plan", {"proto", "ir", "codegen/plan"}},
      {"codegen/cuda", {"proto", "ir", "codegen/plan", "codegen/cuda"}},
      {"codegen", {"proto", "ir", "passes", "models", "codegen"}},
      {"runtime/data", {"ir/base", "proto", "runtime/data"}},
      {"runtime", {"proto", "ir", "codegen/plan", "runtime"}},
      {"tests", {"proto", "ir", "passes", "models", "codegen", "runtime", "bench", "tests"}},
      {"bench", {"proto", "ir", "passes", "models", "codegen", "runtime", "bench", "tests"}},
  };
  return layers;
}

constexpr const char* kFolders[] = {"proto", "ir", "passes", "models", "codegen", "runtime", "bench", "tests"};
constexpr const char* kTopFiles[] = {"CMakeLists.txt", "README.md", "mt"};
constexpr const char* kLibraries[] = {"absl/", "google/protobuf/", "gtest/", "gmock/", "nlohmann/"};

bool Within(const std::string& path, const std::string& folder) {
  return absl::StartsWith(path, absl::StrCat(folder, "/"));
}

// Files below our folders, relative to the source tree, sorted.
std::vector<std::string> FilesOf(const std::vector<std::string>& endings) {
  std::vector<std::string> files;
  for (const char* folder : kFolders) {
    for (const auto& entry : fs::recursive_directory_iterator(fs::path(MT_SOURCE_DIR) / folder)) {
      const std::string path = fs::relative(entry.path(), MT_SOURCE_DIR).string();
      const bool wanted = std::any_of(endings.begin(), endings.end(),
                                      [&path](const std::string& ending) { return absl::EndsWith(path, ending); });
      if (entry.is_regular_file() && wanted) files.push_back(path);
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::vector<std::string> LinesOf(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(absl::StrCat(MT_SOURCE_DIR, "/", path));
  EXPECT_OK(text) << path;
  return absl::StrSplit(text.ok() ? *text : "", '\n');
}

// Why `file` must not include `included`; "" where it may.
std::string IncludeError(const std::string& file, const std::string& included) {
  for (const char* library : kLibraries) {
    if (absl::StartsWith(included, library)) return "";
  }
  const bool ours = std::any_of(std::begin(kFolders), std::end(kFolders),
                                [&included](const char* folder) { return Within(included, folder); });
  if (!ours) return "includes are relative to the root of the tree";
  const std::pair<const std::string, std::vector<std::string>>* layer = nullptr;
  for (const auto& candidate : Layers()) {
    if (Within(file, candidate.first) && (layer == nullptr || candidate.first.size() > layer->first.size()))
      layer = &candidate;
  }
  if (layer == nullptr) return "the folder has no row in Layers()";
  for (const std::string& allowed : layer->second) {
    if (Within(included, allowed)) return "";
  }
  return absl::StrCat(layer->first, " may include ", absl::StrJoin(layer->second, ", "), " only");
}

TEST(Layering, RulesOfThumb) {
  EXPECT_EQ(IncludeError("passes/dce.cc", "ir/graph.h"), "");
  EXPECT_NE(IncludeError("passes/dce.cc", "codegen/compile.h"), "");
  EXPECT_NE(IncludeError("ir/graph.cc", "passes/pass.h"), "");
  EXPECT_NE(IncludeError("ir/base/file.cc", "ir/graph.h"), "");
  EXPECT_NE(IncludeError("models/gpt.cc", "passes/pass.h"), "");
  EXPECT_NE(IncludeError("codegen/plan/plan.cc", "codegen/compile.h"), "");
  EXPECT_NE(IncludeError("codegen/compile.cc", "runtime/backend.h"), "");
  EXPECT_EQ(IncludeError("runtime/executor.cc", "codegen/plan/plan.h"), "");
  EXPECT_NE(IncludeError("runtime/executor.cc", "codegen/compile.h"), "");
  EXPECT_NE(IncludeError("runtime/data/corpus.cc", "ir/graph.h"), "");
  EXPECT_NE(IncludeError("ir/graph.cc", "graph.h"), "");
}

TEST(Layering, EveryIncludeIsAllowed) {
  for (const std::string& file : FilesOf({".h", ".cc", ".cu", ".cuh"})) {
    int64_t number = 0;
    for (const std::string& line : LinesOf(file)) {
      ++number;
      absl::string_view rest = absl::StripAsciiWhitespace(line);
      if (!absl::ConsumePrefix(&rest, "#include ")) continue;
      const std::vector<std::string> parts = absl::StrSplit(rest, absl::ByAnyChar("\"<>"));
      if (parts.size() < 2) continue;
      const std::string& included = parts[1];
      const bool quoted = absl::StartsWith(rest, "\"");
      const bool ours = std::any_of(std::begin(kFolders), std::end(kFolders),
                                    [&included](const char* folder) { return Within(included, folder); });
      EXPECT_TRUE(quoted || !ours) << file << ":" << number << ": write #include \"" << included << "\"";
      if (!quoted) continue;
      EXPECT_EQ(IncludeError(file, included), "") << file << ":" << number << " includes " << included;
      if (!ours) continue;
      const std::string origin = absl::StrReplaceAll(included, {{".pb.h", ".proto"}});
      EXPECT_TRUE(fs::exists(fs::path(MT_SOURCE_DIR) / origin)) << file << ":" << number << ": there is no " << origin;
    }
  }
}

TEST(Layering, HeadersAreGuardedByTheirPath) {
  for (const std::string& file : FilesOf({".h"})) {
    const std::string guard =
        absl::StrCat("MT_", absl::AsciiStrToUpper(absl::StrReplaceAll(file, {{"/", "_"}, {".", "_"}})), "_");
    const std::vector<std::string> lines = LinesOf(file);
    EXPECT_NE(std::find(lines.begin(), lines.end(), absl::StrCat("#ifndef ", guard)), lines.end())
        << file << " lacks #ifndef " << guard;
  }
}

// std::string_view and absl::string_view are two types on Debian 12, and neither converts to the other.
TEST(Layering, OnlyAbslsStringView) {
  for (const std::string& file : FilesOf({".h", ".cc"})) {
    int64_t number = 0;
    for (const std::string& line : LinesOf(file)) {
      ++number;
      const absl::string_view code = absl::string_view(line).substr(0, line.find("//"));
      EXPECT_FALSE(absl::StrContains(code, absl::StrCat("std::", "string_view"))) << file << ":" << number;
      EXPECT_FALSE(absl::StrContains(code, absl::StrCat("<", "string_view>"))) << file << ":" << number;
    }
  }
}

TEST(Layering, TopLevelHoldsOnlyWhatBelongsThere) {
  std::vector<std::string> ignored;
  for (const std::string& line : LinesOf(".gitignore")) {
    const std::string pattern(absl::StripSuffix(absl::StripPrefix(line, "/"), "/"));
    if (!pattern.empty()) ignored.push_back(pattern);
  }
  std::set<std::string> allowed(std::begin(kFolders), std::end(kFolders));
  allowed.insert(std::begin(kTopFiles), std::end(kTopFiles));
  for (const auto& entry : fs::directory_iterator(MT_SOURCE_DIR)) {
    const std::string name = entry.path().filename().string();
    const bool skipped =
        name[0] == '.' || std::any_of(ignored.begin(), ignored.end(), [&name](const std::string& pattern) {
          return ::fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
        });
    EXPECT_TRUE(skipped || allowed.contains(name)) << name << " does not belong at the top level";
  }
}

// A path of somebody's machine, or a promise instead of the work. Spelled in halves, so that this file passes too.
TEST(Layering, NoPrivatePathsAndNoPromises) {
  std::vector<std::string> files =
      FilesOf({".h", ".cc", ".cu", ".cuh", ".proto", ".textproto", ".mtir", ".txt", ".md", ".py", ".json"});
  for (const char* file : {"CMakeLists.txt", "README.md", "mt", ".ci/run"}) {
    if (fs::exists(fs::path(MT_SOURCE_DIR) / file)) files.emplace_back(file);
  }
  const std::vector<std::string> banned = {
      absl::StrCat("/ho", "me/"),  absl::StrCat("/ro", "ot/"), absl::StrCat("/wo", "rk/"), absl::StrCat("/tm", "p/"),
      absl::StrCat("/Us", "ers/"), absl::StrCat("TO", "DO"),   absl::StrCat("FIX", "ME")};
  for (const std::string& file : files) {
    int64_t number = 0;
    for (const std::string& line : LinesOf(file)) {
      ++number;
      for (const std::string& text : banned) {
        EXPECT_FALSE(absl::StrContains(line, text)) << file << ":" << number << " has " << text << ": " << line;
      }
    }
  }
}

std::string OutputOf(const std::string& command) {
  std::FILE* pipe = ::popen(absl::StrCat(command, " 2>&1").c_str(), "r");
  std::string output;
  char buffer[4096];
  for (size_t n = 0; pipe != nullptr && (n = std::fread(buffer, 1, sizeof(buffer), pipe)) > 0;)
    output.append(buffer, n);
  if (pipe != nullptr) ::pclose(pipe);
  return output;
}

// Versions of clang-format disagree in small things, so only the one that the tree is formatted with judges it.
TEST(Layering, FormattedByClangFormat14) {
  const std::string version = OutputOf("clang-format --version");
  if (!absl::StrContains(version, "clang-format version 14.")) {
    GTEST_SKIP() << "clang-format 14 is not installed";
  }
  std::string command = absl::StrCat("cd '", MT_SOURCE_DIR, "' && clang-format --dry-run");
  for (const std::string& file : FilesOf({".h", ".cc", ".cuh"})) absl::StrAppend(&command, " ", file);
  std::set<std::string> unformatted;
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(OutputOf(command), '\n'))) {
    if (absl::StrContains(line, "-Wclang-format-violations")) unformatted.insert(line.substr(0, line.find(':')));
  }
  EXPECT_TRUE(unformatted.empty()) << "run clang-format -i " << absl::StrJoin(unformatted, " ");
}

}  // namespace
}  // namespace mt
