// Memory for temporaries, kept by the thread that used it for its next call.
//
// The C library hands large blocks back to the system as soon as they are freed, and to touch each
// page anew costs as much as the arithmetic on it: a third of a backward at B 8, T = S = 64,
// H = 256 was page faults. Small ones are cut from one block: in a call on a few numbers, a dozen
// calls of malloc are a fifth of the time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace seq2seq_fast {

// Small blocks, and all of them together, have less than kSmall; of the others a thread keeps
// kMostKept.
constexpr size_t kSmall = size_t{64} << 10, kMostKept = size_t{32} << 20;

// The product of sizes. One that does not fit, as that of an expanded tensor's may, is more than
// there is memory for: std::bad_alloc.
int64_t product_of(std::initializer_list<int64_t> sizes);

// `bytes` of uninitialised memory on a 64 byte boundary, given back by the same thread, the last
// one first. `bytes` becomes what give_back is to be told.
void* take(size_t& bytes);
void give_back(void* data, size_t bytes);

// Once in a process: tells the C library to keep up to 128 MiB of what is freed at the end of its
// heap, unless its user has set that (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_,
// GLIBC_TUNABLES). A training step frees its tens of megabytes at once, and to have them back from
// the system was a tenth of a grapheme-to-phoneme step, and half of the time to pack weights.
void keep_freed_memory();

// Asks for pages of 2 MiB below what a large result is about to be written to, if nothing has been
// yet: of 300 MB that a backward over 200 steps fills, small pages take a tenth of its time.
void ask_for_huge_pages(void* data, size_t bytes);

// The same of whole ones, that many calls will read: they are made at once, of pages too that have
// been written to. Small ones lie anywhere, and their lines may crowd in some sets of the cache's
// second level while others are empty.
constexpr size_t kHugePage = size_t{2} << 20;
void collapse_to_huge_pages(void* data, size_t bytes);

}  // namespace seq2seq_fast
