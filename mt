#!/usr/bin/env bash
# The daily verbs: ./mt demo|test|build|bench|fuzz|lint|help. Everything it does is plain cmake, ninja and ctest, printed as it runs.
set -euo pipefail
readonly CALLED_FROM=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

# Debian 12, Debian 13 and Ubuntu 24.04 (universe) use the same names.
readonly PACKAGES=(cmake ninja-build g++ ccache pkg-config ca-certificates protobuf-compiler libprotobuf-dev libabsl-dev
                   libopenblas0-pthread nlohmann-json3-dev libpcre2-dev libutf8proc-dev
                   libcurl4-openssl-dev libssl-dev libzstd-dev libgtest-dev libgmock-dev coinor-cbc)
readonly BUILD=build TOOLS=(mtc mtrun mtcorpus mtlab)
readonly FUZZ_BUILD=build-fuzz FUZZ_PACKAGES=(clang libclang-rt-dev)

usage() {
  cat <<'TEXT'
usage: ./mt VERB

  demo [TEXT]      Trains a small model on real prose, from nothing: installs, builds, prepares, compiles, runs.
                   TEXT: your own UTF-8 file or folder instead of the Polish prose from Debian's fortunes-pl.
  demo --target T  The same on cpu or cuda[:sm_90]; without it, on the GPU that is here, else on the CPU.
  test [ARGS]      Builds and runs the tests; ARGS go to ctest (./mt test -R plan). Ends with what was skipped and why.
  test --mutate    Runs the mutants instead: every planted bug must be caught by a named test.
  build [TARGETS]  Installs what is missing and builds the tools, or what is named (all: tests, too; benches), into build/bin.
  bench [NAME...]  Builds and runs the benches in bench/ (all, or those named).
  fuzz [NAME...] [S]  Builds the fuzz targets of tests/fuzz (all, or those named) with clang and sanitizers and runs them
                   for S seconds each (default: 60), as many at a time as there are cores. What they learn stays in
                   build-fuzz/corpus.
  lint             Checks formatting and layering.
  help             This text.

MT_CMAKE_ARGS holds arguments for cmake: MT_CMAKE_ARGS=-DMT_SANITIZE=address ./mt test
TEXT
}

fail() {  # fail CODE MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

run() {  # Prints a command ready to copy, then runs it.
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

jobs() {  # One a core, and at least 1.5 GB of memory for each.
  local cores memory_kib
  cores=$(nproc)
  memory_kib=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo 2>/dev/null || true)
  if [[ -n $memory_kib && $((memory_kib / 1500000)) -lt $cores ]]; then cores=$((memory_kib / 1500000)); fi
  echo $((cores > 0 ? cores : 1))
}

# Installs the packages named that are missing: as root, or through sudo; else prints the one line to run and exits 2.
need() {
  local missing=() package
  if ! command -v dpkg-query >/dev/null; then
    if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
      fail 2 "this is not Debian or Ubuntu; install the equivalents of: $*"
    fi
    return
  fi
  local installed
  installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null | awk '$2 == "installed" { print $1 }' || true)
  for package in "$@"; do
    grep -qx -- "$package" <<<"$installed" || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  local line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  local as_root=()
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "These packages are missing, and this user has neither root nor sudo. As root:" >&2
      echo "  $line" >&2
      exit 2
    fi
    as_root=(sudo)
    [[ -t 0 ]] || as_root+=(-n)
  fi
  echo "Will install: ${missing[*]}"
  if ! { run ${as_root[@]+"${as_root[@]}"} apt-get update -q &&
         run ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
             "${missing[@]}"; }; then
    echo "The installation failed. As root:" >&2
    echo "  $line" >&2
    exit 2
  fi
}

# Builds the targets named, or everything. ninja runs cmake again by itself where a build file or a glob has changed.
compile() {
  need "${PACKAGES[@]}"
  local arguments="${MT_CMAKE_ARGS:-}"
  local stamp=$BUILD/.mt_cmake_args
  export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=pch_defines,time_macros
  if [[ ! -f $BUILD/build.ninja || ! -f $stamp || $(<"$stamp") != "$arguments" ]]; then
    # shellcheck disable=SC2086  # several arguments in one variable
    run cmake -G Ninja -S . -B $BUILD $arguments
    printf '%s\n' "$arguments" >$stamp
  fi
  run ninja -C $BUILD -j "$(jobs)" "$@"
}

path_line() {
  echo
  echo "The tools are built. To use them by name:"
  echo "  export PATH=$(printf %q "$PWD/$BUILD/bin"):\$PATH"
}

# Reads ctest's log and lists each skipped test of each executable with its reason.
list_skipped() {
  local log=$BUILD/Testing/Temporary/LastTest.log
  [[ -f $log ]] || return 0
  awk '
    /^\[ RUN      \] /   { name = $4; reason = ""; inside = 0; next }
    /: Skipped$/         { inside = 1; next }
    /^\[  SKIPPED \] .*\([0-9]+ ms\)$/ {
      if (!count++) print "\nSkipped:"
      gsub(/^ +| +$/, "", reason)
      printf "  %s: %s\n", $4, reason == "" ? "no reason given" : reason
      inside = 0
      next
    }
    inside && $0 != ""   { reason = reason " " $0 }
    END { if (!count) print "\nSkipped: nothing" }
  ' "$log"
}

verb_test() {
  local mutate=0 arguments=() argument
  for argument in "$@"; do
    if [[ $argument == --mutate ]]; then mutate=1; else arguments+=("$argument"); fi
  done
  compile
  ((mutate)) && arguments=(-C mutate -L mutant ${arguments[@]+"${arguments[@]}"})
  local output=$BUILD/ctest.log status=0
  run ctest --test-dir $BUILD -j "$(jobs)" --output-on-failure --no-tests=error ${arguments[@]+"${arguments[@]}"} 2>&1 |
    tee $output || status=$?
  list_skipped
  grep -E '^[0-9]+% tests passed' $output || true
  return $status
}

verb_bench() {
  local names=("$@") name
  if ((${#names[@]} == 0)); then
    for name in bench/*_bench.cc; do names+=("$(basename "$name" .cc)"); done
  fi
  for name in "${names[@]}"; do
    [[ -f bench/${name%_bench}_bench.cc ]] || fail 2 "there is no bench $name; bench/ holds: $(cd bench && echo *_bench.cc)"
  done
  names=("${names[@]%_bench}")
  compile "${names[@]/%/_bench}"
  for name in "${names[@]}"; do run "$BUILD/bin/${name}_bench"; done
}

# Small files of each kind, in FUZZ_BUILD/seeds/TARGET: those of the tree, and what the tools make.
fuzz_seeds() {
  local to=$FUZZ_BUILD/seeds file name header passes
  rm -rf $to
  for name in "$@"; do mkdir -p "$to/$name" "$FUZZ_BUILD/corpus/$name"; done
  cp models/*.textproto $to/spec/
  mv $to/spec/*.graph.textproto $to/graph/
  for file in tests/interchange/data/*/config.json; do cp "$file" "$to/spec/$(basename "$(dirname "$file")").json"; done
  # Golden files hold several modules or graphs each.
  awk -v to=$to/graph '
    FNR == 1 || /^\/\/ / { out = "" }
    /^(module|graph) @/ && out == "" { out = to "/" ++n ".mtir" }
    out != "" { print > out }' tests/*/*.mtir
  for file in tests/interchange/data/*/*.safetensors; do
    name=$(basename "$(dirname "$file")")-$(basename "$file")
    cp "$file" "$to/safetensors/$name"
    header=$(od -An -t u8 -N 8 "$file" | tr -d ' ')
    tail -c +9 "$file" | head -c "$header" >"$to/safetensors/$name.header"
  done
  for file in tests/tokenizers/data/*/tokenizer.json; do
    cp "$file" "$to/tokenizer_json/$(basename "$(dirname "$file")").json"
  done
  cp tests/tokenizers/data/*.tiktoken $to/tokenizer_json/
  { cat tests/tokenizers/data/files/vocab.bpe; printf '\0'; cat tests/tokenizers/data/files/encoder.json; } >$to/tokenizer_json/gpt2
  cp tests/tokenizers/data/*.model $to/sentencepiece/
  head -n 60 README.md >$FUZZ_BUILD/text.txt
  for name in char bpe:300; do
    $BUILD/bin/mtcorpus prep --input $FUZZ_BUILD/text.txt --out $FUZZ_BUILD/prepared --tokenizer $name --overwrite &>/dev/null
    cp $FUZZ_BUILD/prepared/tokenizer.json "$to/tokenizer_json/$name.json"
    for file in $FUZZ_BUILD/prepared/*.bin; do cp "$file" "$to/bin/$name-$(basename "$file")"; done
  done
  # llm.c's header is 256 words: magic, version, number of tokens.
  { printf '\x88\xd8\x34\x01\1\0\0\0\4\0\0\0'; head -c 1012 /dev/zero; printf '\x2b\1\1\0\2\0\x2b\1'; } >$to/bin/u16
  { printf '\xa1\xd9\x34\x01\7\0\0\0\2\0\0\0'; head -c 1012 /dev/zero; printf '\1\0\0\0\x2b\1\0\0'; } >$to/bin/u32
  for passes in none default fp16 adamw8bit flash,remat,accumulate:2; do
    $BUILD/bin/mtc compile tests/fuzz/seeds/graph/tiny.graph.textproto --target cpu --passes $passes \
      -o "$to/plan/tiny-$passes" &>/dev/null || true
    $BUILD/bin/mtc compile tiny_char --batch 2 --seq 4 --set layers=1,width=8,heads=2,vocab_size=11,dropout=0.1 \
      --target cpu --passes $passes -o "$to/plan/char-$passes" &>/dev/null || true
  done
}

# fuzz_target NAME SECONDS: one line of what it did; the end of its log where it found something.
fuzz_target() {
  local name=$1 log=$FUZZ_BUILD/$1.log status=0 options=()
  [[ -f tests/fuzz/$name.dict ]] && options=("-dict=tests/fuzz/$name.dict")
  local folders=("$FUZZ_BUILD/corpus/$name" "$FUZZ_BUILD/seeds/$name")
  [[ -d tests/fuzz/seeds/$name ]] && folders+=("tests/fuzz/seeds/$name")
  mkdir -p $FUZZ_BUILD/found
  # Small graphs make many short-lived objects: shallow stacks, a small quarantine and libFuzzer's plain schedule (not
  # the one by entropy) do three times as many runs a second.
  ASAN_OPTIONS=malloc_context_size=4:quarantine_size_mb=16:${ASAN_OPTIONS:-} "$FUZZ_BUILD/bin/${name}_fuzz" "${folders[@]}" \
    "-max_total_time=$2" -entropic=0 -timeout=25 -rss_limit_mb=2048 -print_final_stats=1 "-artifact_prefix=$FUZZ_BUILD/found/$name-" \
    ${options[@]+"${options[@]}"} &>"$log" || status=$?
  awk -v name="$name" -v status=$status '
    / cov: / { for (i = 1; i < NF; ++i) if ($i == "cov:") edges = $(i + 1) }
    /^stat::number_of_executed_units/ { units = $2 }
    /^stat::average_exec_per_sec/ { speed = $2 }
    END { printf "%-16s %s, %d runs, %d/s, %d edges\n", name, status ? "FOUND SOMETHING" : "ok", units, speed, edges }' "$log"
  if ((status)); then
    tail -n 60 "$log"
    echo "$name: the input is in $FUZZ_BUILD/found; when it is mended, put it into tests/fuzz/seeds/$name"
  fi
  return $status
}

# Whether clang makes a fuzz target here.
can_fuzz() {
  mkdir -p $FUZZ_BUILD
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >$FUZZ_BUILD/probe.cc
  clang++ -fsanitize=fuzzer,address,undefined $FUZZ_BUILD/probe.cc -o $FUZZ_BUILD/probe &>$FUZZ_BUILD/probe.log
}

verb_fuzz() {
  local all=() names=() name file seconds=60 status=0 argument
  for file in tests/fuzz/*_fuzz.cc; do all+=("$(basename "$file" _fuzz.cc)"); done
  for argument in "$@"; do
    if [[ $argument =~ ^[0-9]+$ ]]; then
      seconds=$argument
    elif [[ -f tests/fuzz/${argument%_fuzz}_fuzz.cc ]]; then
      names+=("${argument%_fuzz}")
    else
      fail 2 "there is no fuzz target $argument; tests/fuzz holds: ${all[*]}"
    fi
  done
  ((${#names[@]})) || names=("${all[@]}")
  if ! can_fuzz && ! { (need "${FUZZ_PACKAGES[@]}") && can_fuzz; }; then
    echo "Skipped: fuzz: no clang++ that links libFuzzer and the sanitizers ($FUZZ_BUILD/probe.log); packages: ${FUZZ_PACKAGES[*]}"
    return
  fi
  compile mtc mtcorpus  # They make seeds.
  [[ -f $FUZZ_BUILD/build.ninja ]] || run cmake -G Ninja -S . -B $FUZZ_BUILD -DMT_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++
  run ninja -C $FUZZ_BUILD -j "$(jobs)" "${names[@]/%/_fuzz}"
  fuzz_seeds "${all[@]}"
  echo "+ tests/fuzz: ${names[*]}, $seconds seconds each"
  export -f fuzz_target
  export FUZZ_BUILD
  printf '%s\n' "${names[@]}" | xargs -P "$(jobs)" -I {} bash -c "fuzz_target {} $seconds" || status=1
  return $status
}

verb_lint() {
  need "${PACKAGES[@]}" clang-format
  compile layering_test
  local files
  mapfile -t files < <(find proto ir passes models codegen runtime tests bench -name '*.h' -o -name '*.cc' -o -name '*.cuh' | sort)
  echo "+ clang-format --dry-run --Werror (${#files[@]} files, $(clang-format --version | grep -o 'version [0-9.]*'))"
  local status=0
  clang-format --dry-run --Werror "${files[@]}" || status=1
  run $BUILD/bin/layering_test --gtest_brief=1 || status=1
  return $status
}

# Polish prose out of Debian's fortunes-pl: literature, aphorisms and an old complaints book, one text after another with a
# blank line between. The package also holds much that is no prose, or not for every guest: the files are chosen by
# name, and a text with a coarse word, an address or a chat line is left out.
demo_text() {  # demo_text TARGET
  local target=$1 folder=/usr/share/games/fortunes/pl work=$BUILD/demo/package
  if [[ ! -d $folder ]]; then
    local hint="give a text of your own: ./mt demo FILE"
    command -v apt-get >/dev/null || fail 4 "the demo's text comes from the Debian package fortunes-pl, and there is no apt-get here; $hint"
    rm -rf "$work"
    mkdir -p "$work"
    echo "+ (cd $work && apt-get download fortunes-pl && dpkg -x fortunes-pl_*.deb .)"
    if ! (cd "$work" && apt-get -q download fortunes-pl 2>log && dpkg -x fortunes-pl_*.deb .); then
      sed 's/^/  /' "$work/log" >&2
      fail 4 "fortunes-pl could not be downloaded (is there a network, and has apt-get update been run?); $hint"
    fi
    folder=$work$folder
  fi
  (cd "$folder" && cat pratchett puchatek seneka zen haiku stachura spolem dowcipy-naukowcy wieza-pilot) |
    LC_ALL=C sed -e 's/\r$//' -e 's/[[:space:]]*$//' |
    LC_ALL=C awk '
      function flush() { if (text != "" && !unfit) printf "%s\n\n", text; text = ""; unfit = 0 }
      /^%$/ { flush(); next }
      /^(\t\t|                )/ { next }  # an attribution
      /[@<>{}|\\^~]|http|anathema|www\.|[0-9][0-9]:[0-9][0-9]/ { unfit = 1 }
      tolower($0) ~ /kurw|chuj|dup[aeiy]|gówn|sra[lłmć]|pierd|jeb|kutas|seks|sikał|orgazm|ginekolog|erotycz|hemoroid|jądra|piersi|nag[aoi] |hitler|stalin/ { unfit = 1 }
      { sub(/^[ \t]+/, "") }
      $0 != "" { text = text (text == "" ? "" : "\n") $0 }
      END { flush() }' >"$target.part"
  [[ $(wc -c <"$target.part") -gt 90000 ]] || fail 4 "fortunes-pl holds less text than expected; give a text of your own: ./mt demo FILE"
  mv "$target.part" "$target"
}

json_number() {  # json_number KEY: the first number under that key of the JSON on standard input
  grep -oE "\"$1\": *-?[0-9][0-9.eE+-]*" | head -n 1 | sed 's/.*: *//'
}

verb_demo() {
  local text= folder=$BUILD/demo target=()
  while (($#)); do
    case $1 in
      --target) target=(--target "${2:?--target needs cpu or cuda}") && shift 2 ;;
      --target=*) target=("$1") && shift ;;
      -*) fail 2 "demo knows no $1; it takes a text and --target" ;;
      *) text=$1 && shift ;;
    esac
  done
  [[ -z $text || $text == /* ]] || text=$CALLED_FROM/$text
  [[ -z $text || -e $text ]] || fail 4 "$text: no such file"
  compile mtc mtrun mtcorpus
  mkdir -p $folder
  if [[ -z $text ]]; then
    text=$folder/prose.txt
    [[ -s $text ]] || demo_text $text
    echo
    echo "The text, $(LC_ALL=C.UTF-8 wc -m <$text) characters of Polish prose, begins:"
    head -n 4 $text | sed 's/^/    /'
  fi
  rm -rf $folder/corpus $folder/run
  run $BUILD/bin/mtcorpus prep --input "$text" --out $folder/corpus --tokenizer char
  # Short sequences and wider initial weights: what lets so small a model leave the plateau of pairs within seconds.
  run $BUILD/bin/mtc compile tiny_char --data $folder/corpus --seq 32 --batch 16 --set init_stddev=0.08 \
    ${target[@]+"${target[@]}"} -o $folder/tiny_char.plan
  run $BUILD/bin/mtrun $folder/tiny_char.plan --data $folder/corpus --steps 800 --lr 3e-3 --warmup 40 --log-every 50 --measure \
    --out $folder/run

  local loss bigram planned measured
  loss=$(sed -n '/"val": {/,/}/p' $folder/run/summary.json | json_number loss)
  bigram=$(sed -n '/"val": {/,/}/p' $folder/run/summary.json | json_number bigram_entropy)
  planned=$(sed -n '/"planned": {/,/}/p' $folder/run/memory.json | json_number arena_bytes)
  measured=$(sed -n '/"measured": {/,/}/p' $folder/run/memory.json | json_number arena_bytes)
  echo
  printf 'val loss %.4f, bigram cross-entropy of the split %.4f: ' "$loss" "$bigram"
  awk -v a="$loss" -v b="$bigram" 'BEGIN { exit !(a < b) }' || fail 1 "the model is no better than counting pairs"
  echo "the model has learnt more than pairs of characters"
  printf 'memory planned %s bytes, measured %s bytes: ' "$planned" "$measured"
  grep -q '"agree": true' $folder/run/memory.json || fail 1 "the measurement does not agree with the plan"
  echo "planned = measured"
}

main() {
  local verb=${1:-help}
  (($#)) && shift
  case $verb in
    demo) verb_demo "$@" ;;
    test) verb_test "$@" ;;
    build)
      (($#)) || set -- "${TOOLS[@]}"
      compile "$@"
      path_line
      ;;
    bench) verb_bench "$@" ;;
    fuzz) verb_fuzz "$@" ;;
    lint) verb_lint "$@" ;;
    help | -h | --help) usage ;;
    *)
      usage >&2
      fail 2 "unknown verb \"$verb\"; the verbs are demo, test, build, bench, fuzz, lint, help"
      ;;
  esac
}

main "$@"
