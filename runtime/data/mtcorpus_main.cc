#include "runtime/data/mtcorpus.h"

int main(int argc, char** argv) { return mt::MtcorpusMain(argc, argv); }
