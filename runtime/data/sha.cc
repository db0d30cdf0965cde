#include "runtime/data/sha.h"

#include <openssl/evp.h>

#include <algorithm>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/data/mapped_file.h"

namespace mt {
namespace {

class Hash {
 public:
  explicit Hash(const EVP_MD* algorithm) : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    CHECK(context_ != nullptr && EVP_DigestInit_ex(context_.get(), algorithm, nullptr) == 1) << "libcrypto";
  }
  void Update(absl::string_view bytes) {
    CHECK(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1) << "libcrypto";
  }
  std::string Hex() {  // The last call.
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    CHECK(EVP_DigestFinal_ex(context_.get(), digest, &size) == 1) << "libcrypto";
    return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), size));
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

absl::StatusOr<std::string> HashOfFile(const std::string& path, bool is_git_blob) {
  ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  Hash hash(is_git_blob ? EVP_sha1() : EVP_sha256());
  if (is_git_blob) hash.Update(absl::StrCat("blob ", file->bytes().size(), absl::string_view("\0", 1)));
  constexpr size_t kPart = size_t{1} << 22;
  for (size_t at = 0; at < file->bytes().size(); at += kPart) {
    hash.Update(file->bytes().substr(at, kPart));
    file->Release(0, static_cast<int64_t>(at));
  }
  return hash.Hex();
}

}  // namespace

absl::StatusOr<std::string> FileSha256(const std::string& path) { return HashOfFile(path, /*is_git_blob=*/false); }

absl::StatusOr<std::string> FileGitBlob(const std::string& path) { return HashOfFile(path, /*is_git_blob=*/true); }

}  // namespace mt
