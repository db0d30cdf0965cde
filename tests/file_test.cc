#include "ir/base/file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;

std::string Folder() {
  const std::string folder = absl::StrCat(::testing::TempDir(), "/mt_file_test_", ::getpid());
  std::filesystem::remove_all(folder);
  EXPECT_OK(MakeFolder(folder));
  return folder;
}

TEST(File, WritesWholeFilesAndReadsThemBack) {
  const std::string folder = Folder(), path = folder + "/a";
  ASSERT_OK(WriteFile(path, "one"));
  ASSERT_OK(WriteFile(path, std::string("t\0o", 3)));
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(path));
  EXPECT_EQ(text, std::string("t\0o", 3));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 1);  // No temporary file is left.
}

TEST(File, SaysWhatIsWrong) {
  const std::string folder = Folder();
  EXPECT_THAT(ReadFile(folder + "/none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(ReadFile(folder), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("is a folder")));
  ASSERT_OK(WriteFile(folder + "/a", "12345"));
  EXPECT_THAT(ReadFile(folder + "/a", 4), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("4 bytes")));
  EXPECT_THAT(WriteFile(folder, "x"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("is a folder")));
  EXPECT_THAT(WriteFile(folder + "/no/file", "x"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("cannot create")));
  EXPECT_THAT(MakeFolder(folder + "/a"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("cannot create the folder")));
}

// Nothing is read of what has no end, and nobody is waited for for long.
TEST(File, RefusesDevicesAndPipesThatNobodyWritesTo) {
  const std::string folder = Folder(), pipe = folder + "/pipe", sparse = folder + "/sparse";
  EXPECT_THAT(ReadFile("/dev/zero"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("is a device")));
  EXPECT_EQ(ReadFile("/dev/null").value_or("x"), "");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT(ReadFile(pipe), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("nobody writes to")));
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_OK(WriteFile(pipe, "late"));
  });
  EXPECT_EQ(ReadFile(pipe).value_or(""), "late");
  writer.join();
  ASSERT_OK(WriteFile(sparse, ""));
  std::filesystem::resize_file(sparse, uintmax_t{1} << 40);
  EXPECT_THAT(ReadFile(sparse), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("limit")));
}

TEST(File, WritesToADeviceWithoutTakingItsPlace) {
  struct stat info;
  if (::stat("/dev/full", &info) != 0 || !S_ISCHR(info.st_mode)) GTEST_SKIP() << "there is no /dev/full here";
  EXPECT_THAT(WriteFile("/dev/full", "x"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("write failed")));
  ASSERT_EQ(::stat("/dev/full", &info), 0);
  EXPECT_TRUE(S_ISCHR(info.st_mode));
  EXPECT_OK(WriteFile("/dev/null", "x"));
}

}  // namespace
}  // namespace mt
