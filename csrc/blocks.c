/* Large blocks of memory: mappings of their own, and the freed ones that are kept.
 *
 * Pages fresh from the system cost several times what a kernel does with them, small ones eight times as much as huge
 * ones, and more in a virtual machine whose host must find them first. So blocks of HUGE bytes and more ask for huge
 * pages, and freed blocks are kept. A new block is, as the first of these that there is:
 *
 *   a kept block of its size, or little more;
 *   the end of a larger kept block;
 *   a new mapping, into which the huge pages of kept blocks are moved (the system can give pages another address); only
 *   what they don't fill is fresh.
 *
 * Freed blocks join their kept neighbours. Keeping costs no memory at a program's peak: blocks in use and kept ones
 * together stay at or below the most that was in use at once; where a new block would bring them above it, the oldest
 * kept ones go. So a training step works in the same pages from its second time on.
 *
 * Who finds the list busy does without, so a fork can't block on it; what several threads map at that moment may exceed
 * the most by as much. */
#define _GNU_SOURCE /* mremap, MADV_HUGEPAGE, MAP_FIXED_NOREPLACE */
#include "entrenar.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HUGE_PAGE = 2 << 20, HUGE = 2 * HUGE_PAGE, KEPT_BLOCKS = 1024 };

/* Moving pages splits mappings, of which the system gives a process some 65,000: with more bytes than that in blocks
 * no pages are moved. */
#define MOST_MOVED ((size_t)32 << 30)

struct block { /* whole pages */
    char *start;
    size_t bytes;
    uint64_t mapping; /* the number of the one it is part of */
};

static atomic_size_t used; /* bytes of blocks in use */

static struct {
    atomic_flag busy;
    int count;
    size_t bytes, most; /* kept; the most that was in use at once */
    struct block block[KEPT_BLOCKS]; /* oldest first */
} kept = {.busy = ATOMIC_FLAG_INIT};

static int enter(void) { return !atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire); }
static void leave(void) { atomic_flag_clear_explicit(&kept.busy, memory_order_release); }

static void unmap(struct block block) { munmap(block.start, block.bytes); }

static struct block take(int i) {
    const struct block block = kept.block[i];
    kept.bytes -= block.bytes;
    memmove(kept.block + i, kept.block + i + 1, (size_t)(--kept.count - i) * sizeof *kept.block);
    return block;
}

/* Keeps a block as number i. */
static void put(int i, struct block block) {
    if (!block.bytes) return;
    if (kept.count == KEPT_BLOCKS) {
        unmap(block);
        return;
    }
    memmove(kept.block + i + 1, kept.block + i, (size_t)(kept.count++ - i) * sizeof *kept.block);
    kept.block[i] = block;
    kept.bytes += block.bytes;
}

static char *map_pages(char *at, size_t bytes, int flags) {
    char *start = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

/* Addresses, from HUGE bytes on from a huge page's boundary; memory comes as it is written. None: {0}. */
static struct block map(size_t bytes) {
    static _Atomic uint64_t mappings;
    const uint64_t mapping = ++mappings;
    if (bytes < HUGE) {
        char *start = map_pages(NULL, bytes, 0);
        return (struct block){start, start ? bytes : 0, mapping};
    }
    char *wide = map_pages(NULL, bytes + HUGE_PAGE, 0);
    if (!wide) return (struct block){0};
    const size_t before = -(uintptr_t)wide % HUGE_PAGE, after = HUGE_PAGE - before;
    const struct block block = {wide + before, bytes, mapping};
    if (before) munmap(wide, before);
    if (after) munmap(block.start + bytes, after);
    madvise(block.start, bytes, MADV_HUGEPAGE); /* a hint: without it all is well */
    return block;
}

/* The huge pages that lie whole in a block. */
static struct block whole(struct block block) {
    const size_t before = -(uintptr_t)block.start % HUGE_PAGE;
    if (block.bytes < before + HUGE_PAGE) return (struct block){block.start, 0, block.mapping};
    return (struct block){block.start + before, (block.bytes - before) / HUGE_PAGE * HUGE_PAGE, block.mapping};
}

enum moved { MOVED, NOT_MOVED, HOLE };

/* A huge page moves to another address, where it replaces what was mapped there. Where the system refuses (a process
 * may have so many mappings and no more), nothing has changed; should it have unmapped the place already, fresh pages
 * take it, or if there are none it is a hole. */
static enum moved move_page(char *from, char *to) {
    if (mremap(from, HUGE_PAGE, HUGE_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) return MOVED;
    char *fresh = map_pages(to, HUGE_PAGE, MAP_FIXED_NOREPLACE); /* never over anything */
    if (fresh == to) return NOT_MOVED;
    if (fresh) munmap(fresh, HUGE_PAGE); /* to older systems the address is a wish */
    return msync(to, HUGE_PAGE, MS_ASYNC) == 0 ? NOT_MOVED : HOLE;
}

/* Fills a new mapping with huge pages of kept blocks, the oldest first. Where it got a hole, what lies beside that is
 * unmapped, and {0} returned. */
static struct block gather(struct block block) {
    struct block to = whole(block);
    for (int i = 0; i < kept.count && to.bytes;) {
        const struct block pages = whole(kept.block[i]);
        if (!pages.bytes) {
            i++;
            continue;
        }
        const struct block from = take(i);
        char *at = pages.start;
        enum moved moved = MOVED;
        while (at < pages.start + pages.bytes && to.bytes && (moved = move_page(at, to.start)) == MOVED)
            at += HUGE_PAGE, to.start += HUGE_PAGE, to.bytes -= HUGE_PAGE;
        put(i, (struct block){at, (size_t)(from.start + from.bytes - at), from.mapping});
        put(i, (struct block){from.start, (size_t)(pages.start - from.start), from.mapping});
        if (moved == NOT_MOVED) break;
        if (moved == HOLE) {
            char *const end = block.start + block.bytes, *const beyond = to.start + HUGE_PAGE;
            if (to.start > block.start) munmap(block.start, (size_t)(to.start - block.start));
            if (end > beyond) munmap(beyond, (size_t)(end - beyond));
            return (struct block){0};
        }
    }
    return block;
}

/* A kept block of `bytes`, or an eighth more, the youngest; or else the end of the smallest that is larger. */
static struct block reuse(size_t bytes) {
    int larger = -1;
    for (int i = kept.count - 1; i >= 0; i--) {
        const size_t has = kept.block[i].bytes;
        if (has < bytes) continue;
        if (has - bytes <= bytes / 8) return take(i);
        if (larger < 0 || has < kept.block[larger].bytes) larger = i;
    }
    if (larger < 0) return (struct block){0};
    struct block *from = &kept.block[larger];
    from->bytes -= bytes;
    kept.bytes -= bytes;
    return (struct block){from->start + from->bytes, bytes, from->mapping};
}

struct header { /* in a block's first EN_HEADER bytes; memory.c knows the first member */
    size_t bytes;
    uint64_t mapping;
};

static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static size_t page_bytes(void) {
    static atomic_size_t known;
    if (!atomic_load_explicit(&known, memory_order_relaxed)) atomic_store(&known, (size_t)sysconf(_SC_PAGESIZE));
    return atomic_load_explicit(&known, memory_order_relaxed);
}

static struct block new_block(size_t bytes) {
    struct block block = reuse(bytes);
    if (block.start) return block;
    block = map(bytes);
    if (block.start && atomic_load(&used) + kept.bytes < MOST_MOVED) block = gather(block);
    if (block.start) return block;
    while (kept.count) unmap(take(0)); /* what is kept may be what is missing */
    return map(bytes);
}

/* Kept blocks go, the oldest first, as far as with what is in use they exceed the most that was. */
static void shed(void) {
    for (size_t now; kept.count && (now = atomic_load(&used)) + kept.bytes > kept.most;) {
        const size_t over = rounded(now + kept.bytes - kept.most, HUGE_PAGE);
        const struct block oldest = take(0);
        const size_t stays = oldest.bytes > over ? oldest.bytes - over : 0;
        unmap((struct block){oldest.start + stays, oldest.bytes - stays, oldest.mapping});
        put(0, (struct block){oldest.start, stays, oldest.mapping});
    }
}

void *en_large_alloc(size_t bytes) {
    struct block block;
    bytes = rounded(bytes, page_bytes());
    if (!enter()) {
        block = map(bytes);
        atomic_fetch_add(&used, block.bytes);
    } else {
        block = new_block(bytes);
        const size_t now = atomic_fetch_add(&used, block.bytes) + block.bytes;
        if (now > kept.most) kept.most = now;
        shed();
        leave();
    }
    if (!block.start) return NULL;
    *(struct header *)block.start = (struct header){block.bytes, block.mapping};
    return block.start + EN_HEADER;
}

size_t en_kept_bytes(void) {
    if (!enter()) return 0;
    const size_t bytes = kept.bytes;
    leave();
    return bytes;
}

/* An eighth of the machine's memory: who drops a model gets its memory back. */
static size_t most_kept(void) {
    static atomic_size_t known;
    if (!atomic_load_explicit(&known, memory_order_relaxed)) {
        const long pages = sysconf(_SC_PHYS_PAGES);
        atomic_store(&known, pages > 8 ? (size_t)pages / 8 * page_bytes() : 1);
    }
    return atomic_load_explicit(&known, memory_order_relaxed);
}

/* The block and the kept ones beside it, of one mapping: a huge page that is part of two can't be moved. */
static struct block joined(struct block block) {
    for (int i = kept.count - 1; i >= 0; i--) {
        const struct block other = kept.block[i];
        if (other.mapping != block.mapping) continue;
        if (other.start + other.bytes != block.start && block.start + block.bytes != other.start) continue;
        take(i);
        if (other.start < block.start) block.start = other.start;
        block.bytes += other.bytes;
    }
    return block;
}

void en_large_free(void *p) {
    const struct header *header = (struct header *)((char *)p - EN_HEADER);
    const struct block block = {(char *)p - EN_HEADER, header->bytes, header->mapping};
    atomic_fetch_sub(&used, block.bytes);
    if (!enter()) {
        unmap(block);
        return;
    }
    put(kept.count, joined(block));
    for (const size_t most = most_kept(); kept.bytes > most;) unmap(take(0));
    leave();
}
