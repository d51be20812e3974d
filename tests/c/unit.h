/* unit.h: the unit tests, for the table in unit.c. Those with a seed are random, and say it. */
#ifndef UNIT_H
#define UNIT_H

#include "check.h"

#define MIB (1ull << 20)

void test_checksum(void);
void test_attach(void);
void test_words_and_processes(void);
void test_start(void);
void test_close_and_pins(void);
void test_twenty_thousand(void);
void test_long_names(void);
void test_detach(void);
void test_base64(uint64_t seed);
void test_hostile_bytes(uint64_t seed);
void test_ids_written(uint64_t seed);
void test_append_and_read(void);
void test_small_records_share(void);
void test_reservations(void);
void test_compaction(void);
void test_garbage(uint64_t seed);
void test_groups(void);
void test_exports(void);
void test_shards(void);
void test_index_overflow(uint64_t seed);
void test_full(void);
void test_refused_memory(void);
void test_file_size_limit(void);
void test_small_file_system(void);
void test_granules(uint64_t seed);
void test_punch(void);
void test_fragmented(void);
void test_lock_after_death(void);

#endif
