/* Large blocks of memory: mappings of their own, and the freed ones that are kept.
 *
 * Pages fresh from the system cost several times what a kernel does with them, small ones eight times as much as huge
 * ones, and more in a virtual machine whose host must find them first. So blocks of HUGE bytes and more ask for huge
 * pages, and freed blocks are kept for the next one of about their size.
 *
 * Keeping costs no memory at a program's peak: blocks in use and kept ones together never exceed the most that was in
 * use at once. Where a new block would, the oldest kept ones go, and their huge pages become the new block's: the
 * system moves pages from one address to another without touching what is in them. So a training step, whose peak
 * always needs what other moments have freed, works in the same pages from its second time on.
 *
 * Who finds the list busy does without, so a fork can't block on it. */
#define _GNU_SOURCE /* mremap, MADV_HUGEPAGE */
#include "entrenar.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, HUGE_PAGE = 2 << 20, HUGE = 2 * HUGE_PAGE, KEPT_BLOCKS = 1024 };

static atomic_size_t used; /* bytes of blocks in use */

struct block {
    char *start; /* a huge page's boundary, from HUGE bytes on */
    size_t bytes;
};

static struct {
    atomic_flag busy;
    int count;
    size_t bytes, most; /* kept; the most that was in use at once */
    struct block block[KEPT_BLOCKS]; /* oldest first */
} kept = {.busy = ATOMIC_FLAG_INIT};

static int enter(void) { return !atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire); }
static void leave(void) { atomic_flag_clear_explicit(&kept.busy, memory_order_release); }

static struct block take(int i) {
    const struct block block = kept.block[i];
    kept.bytes -= block.bytes;
    memmove(kept.block + i, kept.block + i + 1, (size_t)(--kept.count - i) * sizeof *kept.block);
    return block;
}

static void unmap(struct block block) { munmap(block.start, block.bytes); }

static char *map_pages(size_t bytes) {
    char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

/* Addresses; memory comes as it is written. */
static struct block map(size_t bytes) {
    struct block block = {.bytes = bytes};
    if (bytes < HUGE) {
        block.start = map_pages(bytes);
        return block;
    }
    char *wide = map_pages(bytes + HUGE_PAGE);
    if (!wide) return block;
    const size_t before = -(uintptr_t)wide % HUGE_PAGE, after = HUGE_PAGE - before;
    block.start = wide + before;
    if (before) munmap(wide, before);
    if (after) munmap(block.start + bytes, after);
    madvise(block.start, bytes, MADV_HUGEPAGE); /* a hint: without it all is well */
    return block;
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static size_t huge_bytes(struct block block) {
    return block.bytes < HUGE ? 0 : block.bytes / HUGE_PAGE * HUGE_PAGE;
}

/* The last huge pages of a kept block move into `to` from its byte `filled` on, as many as it has room for; returns the
 * bytes that moved. One after the other, since a call moves pages of one mapping only. Where the system refuses, a page
 * of `to` is a new one. */
static size_t move_pages(struct block from, struct block to, size_t filled) {
    const size_t bytes = least(huge_bytes(from), huge_bytes(to) - filled);
    const char *source = from.start + huge_bytes(from) - bytes;
    for (size_t at = 0; at < bytes; at += HUGE_PAGE) {
        char *target = to.start + filled + at;
        if (mremap((void *)(source + at), HUGE_PAGE, HUGE_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target) continue;
        if (mmap(target, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            return SIZE_MAX; /* a hole */
        munmap((void *)(source + at), HUGE_PAGE);
    }
    return bytes;
}

/* The oldest kept block gives its huge pages to `to`, from the byte `filled` on, and its end to the system, until `over`
 * bytes are gone; huge pages before that stay kept. False: `to` has a hole. */
static int surrender(struct block to, size_t *filled, size_t *over) {
    const struct block from = take(0);
    const size_t moved = move_pages(from, to, *filled);
    if (moved == SIZE_MAX) {
        unmap(from);
        return 0;
    }
    size_t stays = huge_bytes(from) - moved;
    const size_t further = *over - least(*over, from.bytes - stays);
    stays -= least(stays, (further + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (stays < HUGE) stays = 0;
    munmap(from.start + stays, from.bytes - stays);
    *filled += moved;
    *over -= least(*over, from.bytes - stays);
    if (stays) {
        memmove(kept.block + 1, kept.block, (size_t)kept.count++ * sizeof *kept.block);
        kept.block[0] = (struct block){from.start, stays};
        kept.bytes += stays;
    }
    return 1;
}

/* A kept block of `bytes` or an eighth more, the youngest. */
static int find(size_t bytes, struct block *found) {
    for (int i = kept.count - 1; i >= 0; i--)
        if (kept.block[i].bytes >= bytes && kept.block[i].bytes - bytes <= bytes / 8) {
            *found = take(i);
            return 1;
        }
    return 0;
}

/* An eighth of the machine's memory: who drops a model gets its memory back. */
static size_t most_kept(void) {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (size_t)pages / 8 * (size_t)page : 0;
}

struct header { /* in the 64 bytes before what the caller gets */
    size_t bytes;
};

void *en_large_alloc(size_t bytes) {
    struct block block = {0};
    int whole = 1;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (!enter()) {
        block = map(bytes);
    } else {
        if (!find(bytes, &block)) block = map(bytes);
        const size_t now = atomic_load(&used) + block.bytes;
        size_t filled = 0, over = now + kept.bytes > kept.most ? now + kept.bytes - kept.most : 0;
        if (now > kept.most) over = kept.bytes, kept.most = now;
        while (block.start && whole && kept.count && over) whole = surrender(block, &filled, &over);
        leave();
    }
    if (!block.start) return NULL;
    if (!whole) {
        unmap(block);
        return NULL;
    }
    atomic_fetch_add(&used, block.bytes);
    ((struct header *)block.start)->bytes = block.bytes;
    return block.start + EN_HEADER;
}

void en_large_free(void *p) {
    struct block block = {.start = (char *)p - EN_HEADER};
    block.bytes = ((struct header *)block.start)->bytes;
    atomic_fetch_sub(&used, block.bytes);
    if (!enter()) {
        unmap(block);
        return;
    }
    const size_t most = most_kept();
    while (kept.count && (kept.count == KEPT_BLOCKS || kept.bytes + block.bytes > most)) unmap(take(0));
    if (block.bytes > most) {
        unmap(block);
    } else {
        kept.block[kept.count++] = block;
        kept.bytes += block.bytes;
    }
    leave();
}
