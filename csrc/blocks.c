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
 * together never exceed the most that was in use at once. Where a new block would make them, the oldest kept ones go. So
 * a training step works in the same pages from its second time on.
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

struct block { /* whole pages */
    char *start;
    size_t bytes;
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

static char *map_pages(size_t bytes) {
    char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

/* Addresses, from HUGE bytes on from a huge page's boundary; memory comes as it is written. */
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

/* The huge pages that lie whole in a block. */
static struct block whole(struct block block) {
    const size_t before = -(uintptr_t)block.start % HUGE_PAGE;
    if (block.bytes < before + HUGE_PAGE) return (struct block){block.start, 0};
    return (struct block){block.start + before, (block.bytes - before) / HUGE_PAGE * HUGE_PAGE};
}

/* A huge page moves to another address, where it replaces what was mapped there. False: that is a hole now. */
static int move_page(char *from, char *to) {
    if (mremap(from, HUGE_PAGE, HUGE_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) return 1;
    munmap(from, HUGE_PAGE); /* part of two mappings, or there are too many: take a fresh one instead */
    return mmap(to, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

/* Fills a new mapping with huge pages of kept blocks, from the ends of the oldest. False: it has a hole. */
static int gather(struct block block) {
    struct block to = whole(block);
    for (int i = 0; i < kept.count && to.bytes;) {
        const struct block pages = whole(kept.block[i]);
        if (!pages.bytes) {
            i++;
            continue;
        }
        const struct block from = take(i);
        char *const end = pages.start + pages.bytes, *at = end;
        int hole = 0;
        for (; at > pages.start && to.bytes && !hole; to.start += HUGE_PAGE, to.bytes -= HUGE_PAGE)
            hole = !move_page(at -= HUGE_PAGE, to.start);
        put(i, (struct block){end, (size_t)(from.start + from.bytes - end)});
        put(i, (struct block){from.start, (size_t)(at - from.start)});
        if (hole) return 0;
    }
    return 1;
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
    return (struct block){from->start + from->bytes, bytes};
}

struct header { /* in a block's first EN_HEADER bytes */
    size_t bytes;
};

void *en_large_alloc(size_t bytes) {
    struct block block = {0};
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (!enter()) {
        block = map(bytes);
    } else {
        block = reuse(bytes);
        if (!block.start) {
            block = map(bytes);
            if (block.start && !gather(block)) {
                unmap(block);
                block.start = NULL;
            }
        }
        const size_t now = atomic_load(&used) + block.bytes;
        if (now > kept.most) kept.most = now;
        while (kept.count && now + kept.bytes > kept.most) {
            const size_t over = (now + kept.bytes - kept.most + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            struct block oldest = take(0);
            const size_t stays = oldest.bytes > over ? oldest.bytes - over : 0;
            unmap((struct block){oldest.start + stays, oldest.bytes - stays});
            put(0, (struct block){oldest.start, stays});
        }
        leave();
    }
    if (!block.start) return NULL;
    atomic_fetch_add(&used, block.bytes);
    ((struct header *)block.start)->bytes = block.bytes;
    return block.start + EN_HEADER;
}

/* An eighth of the machine's memory: who drops a model gets its memory back. */
static size_t most_kept(void) {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (size_t)pages / 8 * (size_t)page : 0;
}

/* The block and the kept ones beside it. */
static struct block joined(struct block block) {
    for (int i = kept.count - 1; i >= 0; i--) {
        const struct block other = kept.block[i];
        if (other.start + other.bytes != block.start && block.start + block.bytes != other.start) continue;
        take(i);
        if (other.start < block.start) block.start = other.start;
        block.bytes += other.bytes;
    }
    return block;
}

void en_large_free(void *p) {
    struct block block = {.start = (char *)p - EN_HEADER};
    block.bytes = ((struct header *)block.start)->bytes;
    atomic_fetch_sub(&used, block.bytes);
    if (!enter()) {
        unmap(block);
        return;
    }
    put(kept.count, joined(block));
    for (const size_t most = most_kept(); kept.bytes > most;) unmap(take(0));
    leave();
}
