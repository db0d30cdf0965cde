// Runs programs of the build as a user does: a folder, a command line, what it printed and its exit code.
#ifndef MT_TESTS_PROCESS_H_
#define MT_TESTS_PROCESS_H_

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "tests/test_util.h"

namespace mt {

struct Outcome {
  int code = -1;
  std::string out, err;
};

// A folder of its own, removed at the end; commands run in it, with build/bin in front of PATH and no GPU to be seen:
// what they print is the same on every machine.
class ProcessFolder {
 public:
  explicit ProcessFolder(const std::string& name)
      : path_(absl::StrCat(::testing::TempDir(), "/", name, "-", getpid())) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ProcessFolder() { std::filesystem::remove_all(path_); }
  ProcessFolder(const ProcessFolder&) = delete;
  ProcessFolder& operator=(const ProcessFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string Path(const std::string& name) const { return absl::StrCat(path_, "/", name); }
  bool Exists(const std::string& name) const { return std::filesystem::exists(Path(name)); }
  void Write(const std::string& name, const std::string& text) const { ASSERT_OK(WriteFile(Path(name), text)); }
  std::string Read(const std::string& name) const { return ReadFile(Path(name)).value_or(""); }
  // Discarded (is_discarded()) where the file is no JSON.
  nlohmann::json ReadJson(const std::string& name) const { return nlohmann::json::parse(Read(name), nullptr, false); }

  // Runs bash on `command`.
  Outcome Run(const std::string& command) const {
    const std::string out = absl::StrCat(path_, ".out"), err = absl::StrCat(path_, ".err");
    const std::string line = absl::StrCat("export CUDA_VISIBLE_DEVICES= PATH=", ShellQuote(MT_BINARY_DIR),
                                          "/bin:$PATH; cd ", ShellQuote(path_), " || exit 99\n", command);
    const std::string whole =
        absl::StrCat("bash -c ", ShellQuote(line), " > ", ShellQuote(out), " 2> ", ShellQuote(err), " < /dev/null");
    const int status = std::system(whole.c_str());
    Outcome outcome;
    outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    outcome.out = ReadFile(out).value_or("");
    outcome.err = ReadFile(err).value_or("");
    std::filesystem::remove(out);
    std::filesystem::remove(err);
    return outcome;
  }

  // One line "error: ...", this exit code, nothing on standard output and no file left behind.
  void ExpectError(const std::string& command, int code, const ::testing::Matcher<const std::string&>& message) const {
    SCOPED_TRACE(command);
    const int64_t before = CountFiles();
    const Outcome outcome = Run(command);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_THAT(outcome.err, ::testing::StartsWith("error: "));
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_THAT(outcome.err, message);
    EXPECT_EQ(CountFiles(), before) << "a file was left behind";
  }

  int64_t CountFiles() const {
    namespace fs = std::filesystem;
    return std::distance(fs::recursive_directory_iterator(path_), fs::recursive_directory_iterator());
  }

 private:
  std::string path_;
};

}  // namespace mt

#endif  // MT_TESTS_PROCESS_H_
