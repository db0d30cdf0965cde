#include "runtime/data/download.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zstd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "ir/base/file.h"
#include "runtime/data/corpus.h"
#include "runtime/data/hub.h"
#include "runtime/data/prep.h"
#include "runtime/data/safetensors.h"
#include "runtime/data/sha.h"
#include "runtime/data/token_file.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct HttpRequest {
  std::string path;
  int64_t from = 0;  // Of a range.
  std::string if_range, authorization;
};

// Answers each connection once with the bytes that `answer` gives, then closes it.
class Server {
 public:
  using Answer = std::function<std::string(const HttpRequest&)>;
  explicit Server(Answer answer) : answer_(std::move(answer)) {
    std::signal(SIGPIPE, SIG_IGN);
    fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::bind(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(::listen(fd_, 64), 0);
    socklen_t size = sizeof address;
    ::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    url_ = absl::StrCat("http://127.0.0.1:", ntohs(address.sin_port));
    thread_ = std::thread([this] { Serve(); });
  }
  ~Server() {
    ::shutdown(fd_, SHUT_RDWR);
    thread_.join();
    ::close(fd_);
  }
  const std::string& url() const { return url_; }
  int requests() const { return requests_; }

 private:
  static std::string Header(const std::string& text, const std::string& key) {
    const size_t at = text.find("\r\n" + key + ": ");
    if (at == std::string::npos) return "";
    const size_t start = at + key.size() + 4;
    return text.substr(start, text.find("\r\n", start) - start);
  }
  void Serve() {
    while (true) {
      const int client = ::accept(fd_, nullptr, nullptr);
      if (client < 0) return;
      std::string text;
      char block[4096];
      while (text.find("\r\n\r\n") == std::string::npos) {
        const ssize_t n = ::recv(client, block, sizeof block, 0);
        if (n <= 0) break;
        text.append(block, static_cast<size_t>(n));
      }
      HttpRequest request;
      request.path = text.substr(4, text.find(' ', 4) - 4);
      const std::string range = Header(text, "Range");
      if (absl::StartsWith(range, "bytes=")) {
        EXPECT_TRUE(absl::SimpleAtoi(range.substr(6, range.size() - 7), &request.from));
      }
      request.if_range = Header(text, "If-Range");
      request.authorization = Header(text, "Authorization");
      ++requests_;
      const std::string out = answer_(request);
      for (size_t done = 0; done < out.size();) {
        const ssize_t n = ::send(client, out.data() + done, out.size() - done, MSG_NOSIGNAL);
        if (n <= 0) break;
        done += static_cast<size_t>(n);
      }
      ::close(client);
    }
  }

  Answer answer_;
  int fd_ = -1;
  std::string url_;
  std::atomic<int> requests_{0};
  std::thread thread_;
};

std::string Response(int status, const std::string& body, const std::string& headers = "") {
  return absl::StrCat("HTTP/1.1 ", status, " X\r\nConnection: close\r\nContent-Length: ", body.size(), "\r\n", headers,
                      "\r\n", body);
}

// What a good server says to a request for `file`.
std::string Serve(const std::string& file, const HttpRequest& request, const std::string& etag) {
  const std::string tag = absl::StrCat("ETag: \"", etag, "\"\r\n");
  if (request.from > 0 && request.if_range == absl::StrCat("\"", etag, "\"")) {
    if (request.from >= static_cast<int64_t>(file.size())) return Response(416, "", tag);
    return Response(
        206, file.substr(static_cast<size_t>(request.from)),
        absl::StrCat(tag, "Content-Range: bytes ", request.from, "-", file.size() - 1, "/", file.size(), "\r\n"));
  }
  return Response(200, file, tag);
}

std::string Compressed(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::string RandomBytes(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::string bytes;
  while (bytes.size() < size) bytes.push_back(static_cast<char>(random()));
  return bytes;
}

class DownloadTest : public ::testing::Test {
 protected:
  DownloadTest() : folder_(absl::StrCat(::testing::TempDir(), "/download_test-", ::getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    options_.attempts = 3;
    options_.backoff_seconds = 0.001;
    options_.stall_seconds = 1;
  }
  ~DownloadTest() override { fs::remove_all(folder_); }
  std::string Path(const std::string& name) const { return absl::StrCat(folder_, "/", name); }
  int64_t Files() const { return std::distance(fs::directory_iterator(folder_), fs::directory_iterator()); }

  const std::string folder_;
  DownloadOptions options_;
};

TEST_F(DownloadTest, TwoHundredCutsGiveTheSameBytes) {
  const std::string file = RandomBytes(400'000, 1);
  std::mt19937 random(2);
  int cuts = 0;
  // Each file is cut a dozen times, in the headers too, and the process gives up and begins again now and then.
  for (int round = 0; cuts < 200; ++round) {
    int left = 12;
    Server server([&](const HttpRequest& request) {
      std::string out = Serve(file, request, "v1");
      if (--left < 0) return out;
      ++cuts;
      return out.substr(0, random() % (random() % 4 == 0 ? 300 : out.size()));
    });
    const std::string path = Path(absl::StrCat("f", round));
    absl::Status status;
    for (int runs = 0; runs < 20; ++runs) {
      status = Download(server.url() + "/f", path, static_cast<int64_t>(file.size()), nullptr, options_);
      if (status.ok()) break;
      ASSERT_TRUE(absl::IsUnavailable(status)) << status;
      ASSERT_FALSE(fs::exists(path));
    }
    ASSERT_OK(status);
    ASSERT_TRUE(ReadFile(path).value() == file);
    ASSERT_EQ(Files(), round + 1);  // No .part is left.
  }
}

TEST_F(DownloadTest, AFileThatChangesMeanwhileIsReadAnew) {
  const std::string first = RandomBytes(100'000, 3);
  const std::string second = RandomBytes(90'000, 4);
  int count = 0;
  Server server([&](const HttpRequest& request) {
    if (++count == 1) return Serve(first, request, "v1").substr(0, 50'000);
    return Serve(second, request, "v2");
  });
  ASSERT_OK(Download(server.url(), Path("f"), std::nullopt, nullptr, options_));
  EXPECT_TRUE(ReadFile(Path("f")).value() == second);
  // A server that continues with the bytes of another version.
  count = 0;
  Server liar([&](const HttpRequest& request) {
    if (++count == 1) return Serve(first, request, "v1").substr(0, 50'000);
    HttpRequest agreed = request;
    agreed.if_range = "\"v2\"";
    return Serve(second, agreed, "v2");
  });
  ASSERT_OK(Download(liar.url(), Path("g"), std::nullopt, nullptr, options_));
  EXPECT_TRUE(ReadFile(Path("g")).value() == second);
}

TEST_F(DownloadTest, WhatIsWrongIsAbsent) {
  const std::string file = RandomBytes(5000, 5);
  const int64_t size = static_cast<int64_t>(file.size());
  struct Case {
    const char* what;
    Server::Answer answer;
    absl::StatusCode code;
    const char* message;
  };
  std::string self;
  const Case cases[] = {
      {"too long", [&](const HttpRequest& r) { return Serve(file + "x", r, "v"); },
       absl::StatusCode::kFailedPrecondition, "larger than the 5000 bytes"},
      {"too short", [&](const HttpRequest& r) { return Serve(file.substr(1), r, "v"); },
       absl::StatusCode::kFailedPrecondition, "4999 bytes, 5000 expected"},
      {"500", [&](const HttpRequest&) { return Response(500, "oops"); }, absl::StatusCode::kUnavailable, "500"},
      {"503 with a body", [&](const HttpRequest&) { return Response(503, file); }, absl::StatusCode::kUnavailable,
       "503"},
      {"404", [&](const HttpRequest&) { return Response(404, file); }, absl::StatusCode::kNotFound, "404"},
      {"403", [&](const HttpRequest&) { return Response(403, file); }, absl::StatusCode::kFailedPrecondition,
       "HF_TOKEN"},
      {"redirect loop", [&](const HttpRequest&) { return Response(302, "", "Location: " + self + "/again\r\n"); },
       absl::StatusCode::kFailedPrecondition, "redirects"},
      {"redirect to a file", [&](const HttpRequest&) { return Response(302, "", "Location: file:///etc/passwd\r\n"); },
       absl::StatusCode::kFailedPrecondition, "rotocol"},
      {"encoded", [&](const HttpRequest&) { return Response(200, file, "Content-Encoding: gzip\r\n"); },
       absl::StatusCode::kFailedPrecondition, "gzip"},
      {"a range that nobody asked for",
       [&](const HttpRequest&) { return Response(206, file, "Content-Range: bytes 0-4999/5000\r\n"); },
       absl::StatusCode::kUnavailable, "does not continue"},
      {"not HTTP", [&](const HttpRequest&) { return std::string("\x01\x02\x03 nonsense"); },
       absl::StatusCode::kFailedPrecondition, "rotocol"},
      {"closes at once", [&](const HttpRequest&) { return std::string(); }, absl::StatusCode::kUnavailable, "again"},
      {"a page", [&](const HttpRequest&) { return Response(200, "<html>" + file.substr(6)); },
       absl::StatusCode::kFailedPrecondition, "is no good"},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.what);
    Server server(test.answer);
    self = server.url();
    const auto check = [&](const std::string& path) {
      return ReadFile(path).value() == file ? absl::OkStatus() : absl::FailedPreconditionError("is no good");
    };
    EXPECT_THAT(Download(server.url() + "/f", Path("f"), size, check, options_),
                StatusIs(test.code, HasSubstr(test.message)));
    EXPECT_FALSE(fs::exists(Path("f")));
    EXPECT_EQ(Files(), 0);
  }
  EXPECT_THAT(Download("http://127.0.0.1:1/f", Path("f"), size, nullptr, options_),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("127.0.0.1:1")));
}

TEST_F(DownloadTest, TheTokenStaysWithItsHost) {
  std::string seen_first, seen_second;
  Server second([&](const HttpRequest& request) {
    seen_second = request.authorization;
    return Response(200, "body");
  });
  std::string target = absl::StrCat("http://localhost", second.url().substr(second.url().rfind(':')), "/x");
  Server first([&](const HttpRequest& request) {
    seen_first = request.authorization;
    return Response(302, "", "Location: " + target + "\r\n");
  });
  options_.bearer = "secret";
  ASSERT_OK(Download(first.url(), Path("f"), std::nullopt, nullptr, options_));
  EXPECT_EQ(seen_first, "Bearer secret");
  EXPECT_EQ(seen_second, "");
}

TEST_F(DownloadTest, SpeakleashFromIndexToShards) {
  std::string lines;
  for (int i = 0; i < 60; ++i) {
    absl::StrAppend(&lines, "{\"meta\": {\"quality\": \"", i % 3 == 0 ? "HIGH" : "LOW",
                    "\", \"x\": {\"quality\": \"NONE\"}}, \"text\": \"Dokument ", i, "\\nzażółć gęślą jaźń\"}\n");
  }
  const std::string packed = Compressed(lines);
  std::string size = absl::StrCat(packed.size());
  Server server([&](const HttpRequest& request) {
    if (request.path == "/speakleash.json") return Response(200, "[{\"name\": \"zbior_b\"}, {\"name\": \"zbior_a\"}]");
    if (request.path == "/zbior_a.manifest") {
      return Response(200, absl::StrCat("{\"name\": \"zbior_a\", \"license\": \"CC\\u001b0\", \"file_size\": ", size,
                                        ", \"stats\": {\"documents\": 60, \"quality\": {\"HIGH\": 20, \"LOW\": 40}}}"));
    }
    if (request.path == "/zbior_a.jsonl.zst") return Serve(packed, request, "v");
    return Response(404, "");
  });
  ASSERT_OK_AND_ASSIGN(const auto names, ListSpeakleash(server.url(), options_));
  EXPECT_THAT(names, ElementsAre("zbior_a", "zbior_b"));
  ASSERT_OK_AND_ASSIGN(const SpeakleashCorpus about, DescribeSpeakleash(server.url(), "zbior_a", options_));
  EXPECT_EQ(about.documents, 60);
  EXPECT_NEAR(about.high_quality, 1.0 / 3, 1e-9);
  EXPECT_THAT(DescribeSpeakleash(server.url(), "zbior_c", options_),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("mtcorpus list")));
  EXPECT_THAT(DescribeSpeakleash(server.url(), "../x", options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("..")));

  ASSERT_OK_AND_ASSIGN(const std::string path, GetSpeakleash(server.url(), "zbior_a", folder_, {}, options_));
  EXPECT_TRUE(ReadFile(path).value() == packed);
  const int before = server.requests();
  ASSERT_OK_AND_ASSIGN(const std::string some,
                       GetSpeakleash(server.url() + "/", "zbior_a", folder_, {"HIGH", 7}, options_));
  EXPECT_EQ(server.requests(), before + 1);  // The manifest alone.
  EXPECT_EQ(fs::path(some).filename(), "zbior_a.HIGH.7.jsonl");
  const std::string filtered = ReadFile(some).value();
  EXPECT_EQ(std::count(filtered.begin(), filtered.end(), '\n'), 7);
  EXPECT_THAT(filtered, HasSubstr("Dokument 18\\n"));

  // The same corpus from the compressed file, from its lines, and from its texts one in a file.
  PrepOptions prep;
  prep.tokenizer = "char";
  prep.input = path;
  prep.output = Path("a");
  ASSERT_OK_AND_ASSIGN(const Manifest packed_manifest, PrepareCorpus(prep));
  ASSERT_OK(WriteFile(Path("plain.jsonl"), lines));
  prep.input = Path("plain.jsonl");
  prep.output = Path("b");
  ASSERT_OK_AND_ASSIGN(const Manifest plain_manifest, PrepareCorpus(prep));
  fs::create_directories(Path("texts"));
  for (int i = 0; i < 60; ++i) {
    ASSERT_OK(WriteFile(Path(absl::StrCat("texts/", 100 + i)), absl::StrCat("Dokument ", i, "\nzażółć gęślą jaźń")));
  }
  prep.input = Path("texts");
  prep.output = Path("c");
  ASSERT_OK_AND_ASSIGN(const Manifest text_manifest, PrepareCorpus(prep));
  EXPECT_EQ(packed_manifest.documents, "record");
  for (int s = 0; s < 3; ++s) {
    ASSERT_EQ(packed_manifest.splits[s].shards.size(), 1u);
    EXPECT_EQ(packed_manifest.splits[s].shards[0].crc, plain_manifest.splits[s].shards[0].crc);
    EXPECT_EQ(packed_manifest.splits[s].shards[0].crc, text_manifest.splits[s].shards[0].crc);
  }

  size = "77";
  fs::remove(path);
  EXPECT_THAT(GetSpeakleash(server.url(), "zbior_a", folder_, {}, options_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("77 bytes")));
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(DownloadTest, JsonLinesThatAreWrongAreNamed) {
  const std::string good = "{\"Body\": \"x\"}\n{\"Body\": \"y\"}\n{\"Body\": \"z\"}\n";
  struct Case {
    std::string name, contents;
    const char* message;
  };
  std::string cut = Compressed(good);
  cut.resize(cut.size() - 3);
  std::string damaged = Compressed(RandomBytes(3000, 1));
  damaged[5] = static_cast<char>(damaged[5] ^ 0xFF);
  const Case cases[] = {
      {"a.jsonl", "{\"Body\": \"x\"}\n{\"text\": \"x\"}\n", "line 2 has no string \"Body\""},
      {"b.jsonl", "{\"Body\": 7}\n", "line 1 has no string"},
      {"c.jsonl", "{\"Body\": \"x\"\n", "line 1 is not valid JSON"},
      {"d.jsonl", "[1]\n", "not a JSON object"},
      {"e.jsonl", "{\"Body\": \"x\", \"Body\": \"y\"}\n", "twice"},
      {"f.jsonl", absl::StrCat("{\"a\": ", std::string(100, '['), std::string(100, ']'), "}\n"), "deeper"},
      {"g.jsonl", "{\"Body\": \"\xFF\"}\n", "line 1 is not UTF-8"},
      {"h.jsonl.zst", "<html>no</html>", "not compressed"},
      {"i.jsonl.zst", cut, "cut off"},
      {"j.jsonl.zst", damaged, "i"},
      {"k.jsonl.zst", "", "not compressed"},
  };
  PrepOptions prep;
  prep.tokenizer = "char";
  prep.text_field = "Body";
  prep.output = Path("out");
  for (const Case& test : cases) {
    ASSERT_OK(WriteFile(Path(test.name), test.contents));
    prep.input = Path(test.name);
    EXPECT_THAT(PrepareCorpus(prep),
                StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr(test.name), HasSubstr(test.message))));
    EXPECT_FALSE(fs::exists(Path("out/manifest.json")));
  }
  // A small file that unpacks to much: bounded by the limit of a line.
  ASSERT_OK(WriteFile(Path("bomb.jsonl.zst"), Compressed(std::string(size_t{300} << 20, ' '))));
  prep.input = Path("bomb.jsonl.zst");
  EXPECT_THAT(PrepareCorpus(prep), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("longer than 256 MiB")));
  ASSERT_OK(WriteFile(Path("good.jsonl.zst"), Compressed(good)));
  prep.input = Path("good.jsonl.zst");
  EXPECT_THAT(PrepareCorpus(prep), IsOk());
}

TEST_F(DownloadTest, HuggingFaceFoldersAndTokenizers) {
  ASSERT_OK_AND_ASSIGN(const auto writer,
                       SafetensorsWriter::Create(Path("w"), {{"x", SafetensorsType::kF32, {1}}}, {}));
  ASSERT_OK(writer->Append("x", std::string(4, '\0')));
  ASSERT_OK(writer->Finish());
  const std::string weights = ReadFile(Path("w")).value();
  auto trainer = NewTokenizerTrainer("bpe:300").value();
  trainer->Add("ala ma kota ala ma kota");
  const std::string tokenizer = (*trainer->Train())->Serialize();
  std::string map = "{\"weight_map\": {\"x\": \"model-1.safetensors\", \"y\": \"model-2.safetensors\"}}";
  std::string token;
  Server server([&](const HttpRequest& request) {
    token = request.authorization;
    const std::string base = "/owner/model/resolve/main/";
    if (request.path == base + "config.json") return Response(200, "{\"model_type\": \"gpt2\"}");
    if (request.path == base + "tokenizer.json") return Response(200, tokenizer);
    if (request.path == base + "model.safetensors.index.json") return Response(200, map);
    if (absl::EndsWith(request.path, ".safetensors")) return Serve(weights, request, "w");
    return Response(404, "<html>");
  });
  options_.bearer = "t";
  ASSERT_OK_AND_ASSIGN(const auto paths,
                       GetHuggingFace(server.url(), "owner/model", Path("model"), HubFiles::kEverything, options_));
  EXPECT_EQ(paths.size(), 5u);
  EXPECT_EQ(token, "Bearer t");
  EXPECT_TRUE(ReadFile(Path("model/model-2.safetensors")).value() == weights);
  map = "{\"weight_map\": {\"x\": \"../../evil.safetensors\"}}";
  EXPECT_THAT(GetHuggingFace(server.url(), "owner/model", Path("evil"), HubFiles::kEverything, options_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no plain name")));
  EXPECT_THAT(GetHuggingFace(server.url(), "owner/none", Path("none"), HubFiles::kEverything, options_),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("owner/none")));
  EXPECT_THAT(GetHuggingFace(server.url(), "owner/../x", Path("none"), HubFiles::kEverything, options_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("..")));

  ::setenv("MT_CACHE", Path("cache").c_str(), 1);
  ::setenv("HF_ENDPOINT", server.url().c_str(), 1);
  EXPECT_TRUE(IsHubName("owner/model") && IsHubName("gpt2") && !IsHubName("bpe:300") && !IsHubName("a/b/c"));
  ASSERT_OK(WriteFile(Path("text.txt"), "ala ma kota\n\nkot ma ale\n\nkota"));
  PrepOptions prep;
  prep.input = Path("text.txt");
  prep.output = Path("corpus");
  prep.tokenizer = "owner/model";
  ASSERT_OK_AND_ASSIGN(const Manifest manifest, PrepareCorpus(prep));
  EXPECT_EQ(manifest.tokenizer_hash, ParseTokenizer(tokenizer).value()->hash());
  ::setenv("HF_ENDPOINT", "http://127.0.0.1:1", 1);
  prep.overwrite = true;
  EXPECT_THAT(PrepareCorpus(prep), IsOk());  // From the cache.
  prep.tokenizer = "gpt2";
  EXPECT_THAT(PrepareCorpus(prep), StatusIs(absl::StatusCode::kNotFound,
                                            AllOf(HasSubstr("http://127.0.0.1:1/openai-community/gpt2/resolve/main"),
                                                  HasSubstr("cache/openai-community/gpt2/tokenizer.json"))));
}

TEST_F(DownloadTest, HashesOfFiles) {
  const auto sha256 = [this](const std::string& text) {
    EXPECT_OK(WriteFile(Path("hashed"), text));
    return FileSha256(Path("hashed")).value();
  };
  // FIPS 180-2, appendix B.
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256(std::string(9'000'001, 'a')),
            "b9e1a83460a44df25da4627ddb8271e3dbdfc7685d468e930187b57b20ad93f7");  // More than one part of the file.
  // git hash-object.
  ASSERT_OK(WriteFile(Path("hashed"), "test content\n"));
  EXPECT_EQ(FileGitBlob(Path("hashed")).value(), "d670460b4b4aece5915caf5c68d12f560a9fe3e4");
  EXPECT_THAT(FileSha256(Path("missing")), StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing")));
}

// As Hugging Face's server: large files are elsewhere and named by SHA-256, small ones by git.
TEST_F(DownloadTest, HuggingFaceFilesAreKnownByTheirHashes) {
  std::string config = "{\"model_type\": \"gpt2\"}";
  std::string weights;
  const auto make_weights = [&](char value) {
    const auto writer = SafetensorsWriter::Create(Path("w"), {{"x", SafetensorsType::kF32, {1000}}}, {});
    EXPECT_OK((*writer)->Append("x", std::string(4000, value)));
    EXPECT_OK((*writer)->Finish());
    weights = ReadFile(Path("w")).value();
  };
  make_weights('a');
  auto trainer = NewTokenizerTrainer("bpe:300").value();
  trainer->Add("ala ma kota ala ma kota");
  const std::string tokenizer = (*trainer->Train())->Serialize();
  const auto sha256 = [this](const std::string& text) {
    EXPECT_OK(WriteFile(Path("hashed"), text));
    return FileSha256(Path("hashed")).value();
  };
  const auto blob = [this](const std::string& text) {
    EXPECT_OK(WriteFile(Path("hashed"), text));
    return FileGitBlob(Path("hashed")).value();
  };
  int cuts = 0;
  bool damaged = false;
  std::vector<std::string> bodies;  // Sent whole.
  Server cdn([&](const HttpRequest& request) {
    std::string sent = weights;
    if (damaged) sent[sent.size() / 2] = static_cast<char>(sent[sent.size() / 2] ^ 1);
    const std::string out = Serve(sent, request, "an md5, perhaps");
    if (cuts-- > 0) return out.substr(0, out.size() / 2);
    bodies.push_back(request.path);
    return out;
  });
  Server server([&](const HttpRequest& request) {
    const std::string base = "/owner/model/resolve/main/";
    const auto small = [&](const std::string& text) {
      return Response(200, text, absl::StrCat("ETag: \"", blob(text), "\"\r\n"));
    };
    if (request.path == base + "config.json") return small(config);
    if (request.path == base + "tokenizer.json") return small(tokenizer);
    if (request.path == base + "model.safetensors") {
      return Response(302, "",
                      absl::StrCat("Location: ", cdn.url(), "/blob\r\nX-Linked-Size: ", weights.size(),
                                   "\r\nX-Linked-Etag: \"", sha256(weights), "\"\r\nETag: \"x\"\r\n"));
    }
    return Response(404, "");
  });
  const auto get = [&] {
    return GetHuggingFace(server.url(), "owner/model", Path("m"), HubFiles::kEverything, options_).status();
  };
  cuts = 3;
  ASSERT_OK(get());
  EXPECT_TRUE(ReadFile(Path("m/model.safetensors")).value() == weights);
  const size_t before = bodies.size();
  ASSERT_OK(get());  // All there: the second server is asked for headers alone.
  const fs::file_time_type written = fs::last_write_time(Path("m/model.safetensors"));
  EXPECT_LE(bodies.size(), before + 1);
  // A file that was changed here, and one that was changed there.
  ASSERT_OK(WriteFile(Path("m/tokenizer.json"), tokenizer + " "));
  config = "{\"model_type\": \"llama\"}";
  ASSERT_OK(get());
  EXPECT_EQ(ReadFile(Path("m/tokenizer.json")).value(), tokenizer);
  EXPECT_EQ(ReadFile(Path("m/config.json")).value(), config);
  EXPECT_EQ(fs::last_write_time(Path("m/model.safetensors")), written);
  // What comes is not what was named: a bit on the way. What was there stays.
  const std::string old = weights;
  make_weights('b');
  damaged = true;
  EXPECT_THAT(get(), StatusIs(absl::StatusCode::kFailedPrecondition,
                              AllOf(HasSubstr("model.safetensors"), HasSubstr("has not the hash"),
                                    HasSubstr(sha256(weights)))));
  EXPECT_TRUE(ReadFile(Path("m/model.safetensors")).value() == old);
  EXPECT_FALSE(fs::exists(Path("m/model.safetensors.part")));
  fs::remove(Path("m/model.safetensors"));
  EXPECT_THAT(get(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has not the hash")));
  EXPECT_FALSE(fs::exists(Path("m/model.safetensors")));
  damaged = false;
  ASSERT_OK(get());
  EXPECT_TRUE(ReadFile(Path("m/model.safetensors")).value() == weights);
  // Nobody answers: whether a file that is not here exists cannot be known.
  options_.attempts = 1;
  EXPECT_THAT(GetHuggingFace("http://127.0.0.1:1", "owner/model", Path("m"), HubFiles::kEverything, options_).status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("tokenizer_config.json")));
}

// The header of llm.c's files.
std::string TokenFileBytes(uint32_t magic, uint32_t version, const std::vector<uint32_t>& tokens, size_t width) {
  std::string bytes(1024, '\0');
  const auto put = [&](size_t at, uint32_t value, size_t size) {
    for (size_t i = 0; i < size; ++i) bytes[at + i] = static_cast<char>(value >> (8 * i));
  };
  put(0, magic, 4);
  put(4, version, 4);
  put(8, static_cast<uint32_t>(tokens.size()), 4);
  for (const uint32_t token : tokens) {
    bytes.resize(bytes.size() + width);
    put(bytes.size() - width, token, width);
  }
  return bytes;
}

TEST_F(DownloadTest, TokenFilesOfLlmC) {
  auto trainer = NewTokenizerTrainer("bpe:280").value();
  trainer->Add("ala ma kota, ala ma psa, ala ma ala ma");
  const std::unique_ptr<Tokenizer> tokenizer = trainer->Train().value();
  ASSERT_OK(WriteFile(Path("tokenizer.json"), tokenizer->Serialize()));
  // llm.c writes the end of a document in front of each.
  std::vector<uint32_t> tokens;
  std::string text;
  for (int i = 0; i < 40; ++i) {
    const std::string document = absl::StrCat("ala ma ", i, " kota");
    tokens.push_back(static_cast<uint32_t>(tokenizer->end_of_document()));
    for (const int32_t id : tokenizer->Encode(document)) tokens.push_back(static_cast<uint32_t>(id));
    absl::StrAppend(&text, document, "\n");
  }
  ASSERT_OK(WriteFile(Path("text.txt"), text));
  const std::string small = TokenFileBytes(20240520, 1, tokens, 2);
  ASSERT_OK(WriteFile(Path("a.bin"), small));
  ASSERT_OK(WriteFile(Path("b.bin"), TokenFileBytes(20240801, 7, tokens, 4)));
  PrepOptions prep;
  prep.tokenizer = Path("tokenizer.json");
  std::vector<Manifest> manifests;
  for (const char* input : {"text.txt", "a.bin", "b.bin"}) {
    prep.input = Path(input);
    prep.output = Path(absl::StrCat(input, ".corpus"));
    prep.documents = DocumentMode::kLine;
    ASSERT_OK_AND_ASSIGN(manifests.emplace_back(), PrepareCorpus(prep));
  }
  for (int s = 0; s < 3; ++s) {
    for (size_t m : {size_t{1}, size_t{2}}) {
      EXPECT_EQ(manifests[m].splits[s].shards[0].crc, manifests[0].splits[s].shards[0].crc);
      EXPECT_EQ(manifests[m].splits[s].bytes, manifests[0].splits[s].bytes);
      EXPECT_EQ(manifests[m].splits[s].words, manifests[0].splits[s].words);
    }
  }
  constexpr auto kBad = absl::StatusCode::kFailedPrecondition;
  prep.overwrite = true;
  prep.tokenizer = "bpe:300";
  EXPECT_THAT(PrepareCorpus(prep), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("holds tokens")));
  prep.tokenizer = Path("tokenizer.json");
  prep.input = Path("c.bin");
  ASSERT_OK(WriteFile(prep.input, small.substr(0, small.size() - 1)));
  EXPECT_THAT(PrepareCorpus(prep), StatusIs(kBad, HasSubstr("cut off")));
  std::string outside = small;
  outside[1024 + 2 * 5 + 1] = '\x7F';
  ASSERT_OK(WriteFile(prep.input, outside));
  EXPECT_THAT(PrepareCorpus(prep), StatusIs(kBad, HasSubstr("token 5 is ")));
  // Flipped bits: a named error, or a corpus.
  std::mt19937 random(4);
  for (int i = 0; i < 150; ++i) {
    std::string bad = small;
    const size_t at = random() % (i % 2 == 0 ? 12 : bad.size());
    bad[at] = static_cast<char>(bad[at] ^ 1 << (random() % 8));
    ASSERT_OK(WriteFile(prep.input, bad));
    const absl::StatusOr<std::unique_ptr<TokenFile>> file = TokenFile::Open(prep.input, *tokenizer);
    if (!file.ok()) continue;
    std::vector<int32_t> ids;
    for (int64_t d = 0; d < (*file)->num_documents(); ++d) {
      (*file)->Read(d, &ids);
      for (const int32_t id : ids) ASSERT_TRUE(id >= 0 && id < tokenizer->vocab_size());
    }
  }
}

}  // namespace
}  // namespace mt
