// Files that are none of ours, handed to every command that reads one: one error, an exit code, no crash and no
// waiting.
#include <sys/stat.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "tests/process.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

class ForeignFilesTest : public ::testing::Test {
 protected:
  // A corpus, a plan, a run with a checkpoint, and the foreign files.
  ForeignFilesTest() : folder_("foreign_files_test") {
    std::string text;
    for (int i = 0; i < 60; ++i) absl::StrAppend(&text, "the river ran over stone number ", i, " and on\n\n");
    folder_.Write("text.txt", text);
    std::string jpeg("\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01", 12);
    for (int i = 0; i < 5000; ++i) jpeg.push_back(static_cast<char>(i * i * 31 + i / 7));
    folder_.Write("jpeg", jpeg);
    folder_.Write("elf", ReadFile("/proc/self/exe").value().substr(0, 20000));
    folder_.Write("empty", "");
    fs::create_directories(folder_.Path("folder"));
    folder_.Write("sparse", "");
    fs::resize_file(folder_.Path("sparse"), uintmax_t{4} << 30);
    fs::create_symlink("/dev/zero", folder_.Path("zero"));
    ::mkfifo(folder_.Path("fifo").c_str(), 0600);
    const Outcome made = folder_.Run(
        "mtcorpus prep --input text.txt --out corpus --tokenizer char && "
        "mtc compile tiny_char --data corpus --batch 1 --seq 4 --set layers=1,width=8,heads=2 --target cpu -o p.plan "
        "&& "
        "mtrun p.plan --data corpus --steps 1 --save-every 1 --out run");
    EXPECT_EQ(made.code, 0) << made.err;
  }

  // One line "error: ...", an exit code of the table in time; what was printed before it may stand there, too.
  void ExpectError(const std::string& command) {
    const Outcome outcome = folder_.Run(absl::StrCat("ulimit -v 16000000; timeout 60 ", command));
    EXPECT_TRUE(outcome.code >= 1 && outcome.code <= 9) << command << ": " << outcome.code << "\n" << outcome.err;
    int64_t errors = 0;
    for (const absl::string_view line : absl::StrSplit(outcome.err, '\n')) errors += absl::StartsWith(line, "error: ");
    EXPECT_EQ(errors, 1) << command << "\n" << outcome.err;
    ++commands_;
  }

  // "@": the file; "%": a folder of its own for each command.
  void ExpectErrors(const std::string& file, const std::vector<std::string>& commands) {
    for (const std::string& command : commands) {
      fs::remove_all(folder_.Path("own"));
      fs::create_directories(folder_.Path("own"));
      ExpectError(absl::StrReplaceAll(command, {{"@", absl::StrCat("./", file)}}));
    }
  }

  const ProcessFolder folder_;
  int64_t commands_ = 0;
};

// `at`: a command, after the file was put in the place of one of a folder that was whole.
std::string Instead(const std::string& whole, const std::string& part, const std::string& command) {
  return absl::StrCat("bash -c 'cp -r ", whole, " own/whole && rm own/whole/", part, " && ln -s $PWD/@ own/whole/",
                      part, " && exec ", command, "'");
}

TEST_F(ForeignFilesTest, EveryCommandRefusesThem) {
  const std::string train = "mtrun p.plan --data corpus --steps 1 ";
  const std::vector<std::string> quick = {
      "mtc compile @ -o own/x.plan",
      "mtc inspect @",
      "mtrun @ --dry-run",
      train + "--init @",
      "mtcorpus prep --input text.txt --out own/c --tokenizer @",
      "mtcorpus prep --input text.txt --out own/c --tokenizer spm:@",
      "mtcorpus stat @",
      "mtlab run @ --data corpus",
      Instead("corpus", "manifest.json", "mtrun p.plan --data own/whole --steps 1"),
      Instead("corpus", "train-00000.bin", "mtrun p.plan --data own/whole --steps 1"),
      Instead("run", "step-1/model.safetensors", "mtrun p.plan --data corpus --steps 1 --init own/whole/step-1"),
  };
  const std::vector<std::string> more = {
      "bash -c 'ln -s $PWD/@ own/x.graph.textproto && exec mtc compile own/x.graph.textproto -o own/x.plan'",
      "mtc fit @ --memory 1GiB",
      "mtc compile hf:@ -o own/x.plan",
      "mtc compile tiny_char --data @ -o own/x.plan",
      "bash -c 'ln -s $PWD/@ own/config.json && exec mtc compile hf:own -o own/x.plan'",
      "mtrun p.plan --data @ --steps 1",
      train + "--init hf:@",
      train + "--resume @",
      "mtcorpus prep --input text.txt --out own/c --tokenizer hf:@",
      "bash -c 'ln -s $PWD/@ own/x.gpt2.tiktoken && exec mtcorpus stat --input text.txt --tokenizer "
      "own/x.gpt2.tiktoken'",
      "bash -c 'ln -s $PWD/@ own/tokenizer.json && exec mtcorpus stat --input text.txt --tokenizer hf:own'",
      "bash -c 'ln -s $PWD/@ own/encoder.json && cp text.txt own/vocab.bpe && exec mtcorpus stat --input text.txt "
      "--tokenizer hf:own'",
      "mtlab run lab8 --data @",
      Instead("run", "step-1/manifest.json", "mtrun p.plan --data corpus --steps 1 --resume own/whole/step-1"),
      Instead("run", "step-1/optimizer.safetensors", "mtrun p.plan --data corpus --steps 1 --resume own/whole/step-1"),
  };
  for (const char* file : {"jpeg", "elf", "empty", "folder"}) {
    ExpectErrors(file, quick);
    ExpectErrors(file, more);
    ExpectErrors(file, {"mtcorpus prep --input @ --out own/c --tokenizer char", "mtcorpus stat --input @"});
  }
  for (const char* file : {"jpeg", "elf", "folder"}) ExpectErrors(file, {train + "--config @"});
  ExpectErrors("sparse", quick);
  ExpectErrors("zero", quick);
  ExpectErrors("zero", {train + "--config @", "mtcorpus prep --input @ --out own/c", "mtcorpus stat --input @"});
  // Each takes two seconds.
  ExpectErrors("fifo", {"mtc inspect @", "mtrun @ --dry-run", "mtcorpus prep --input @ --out own/c --tokenizer char",
                        "mtcorpus stat --input text.txt --tokenizer @"});
  std::printf("%lld commands\n", static_cast<long long>(commands_));
}

// Pipes that somebody writes to are files like others, as <(...) of a shell.
TEST_F(ForeignFilesTest, PipesAreRead) {
  const Outcome piped = folder_.Run(
      "mtcorpus prep --input <(sleep 0.3; cat text.txt) --out piped --tokenizer char && "
      "mtrun p.plan --data corpus --dry-run --config <(echo 'steps: 3') && "
      "cmp piped/train-00000.bin corpus/train-00000.bin");
  EXPECT_EQ(piped.code, 0) << piped.err;
}

}  // namespace
}  // namespace mt
