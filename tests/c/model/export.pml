/* SPIN model of the two-step export of two sessions' trajectories in one request.
 *
 * An exporter (worker 0) opens a transaction word, appends EXPORTING to both sessions' logs, writes the reply, and
 * commits by one CAS when the reply's last byte is out. It then sets the records' outcomes and removes the sessions.
 * It may be killed between any two steps; the sweep then aborts an open transaction or finishes a committed one. A
 * second worker repeats the client's request when the client saw its connection break, and otherwise
 * (another client) asks for the same trajectories at any time.
 *
 * Claims:
 *   E1 a trajectory is given out as exported to at most one client who got the whole reply
 *   E2 a client who got the whole reply finds both sessions exported, never one
 *   E3 when all is quiet every trajectory is either ready or exported and removed; no transaction is left open
 *
 * Variants that must FAIL:
 *   -DCOMMIT_EARLY   committing before the reply is out: a kill in between loses the trajectories
 *   -DNO_TXN         an outcome word a session instead of one transaction word: a kill in between splits the two
 */
#define READY 0
#define EXPORTING 1     /* an EXPORTING record refers to the transaction; what it means depends on that word */
#define EXPORTED 2      /* outcome COMMITTED is set in the record */
#define NONE 0
#define OPEN 1
#define COMMITTED 2

byte log[2];                       /* the newest word on each session's trajectory */
byte by[2];                        /* transaction generation the EXPORTING record refers to */
byte txn = NONE, gen = 1, txn_owner = 0;
bool removed[2];
byte got = 0;                      /* clients that received a whole reply with both trajectories */
bool dead = false, swept = false, broke = false;
byte crashes = 0, finished = 0;

inline may_die() { if :: crashes < 1 -> crashes++; goto killed :: skip fi }

/* What a session's log means to whoever folds it now. */
#define IN_PROGRESS(i) (log[i] == EXPORTING && txn == OPEN && by[i] == gen)
#define DONE(i) (log[i] == EXPORTED || (log[i] == EXPORTING && txn == COMMITTED && by[i] == gen))

inline finish(i) {
    atomic { if :: log[i] == EXPORTING && by[i] == gen -> log[i] = EXPORTED :: else fi };
    removed[i] = true
}

proctype exporter(byte me) {
    byte i = 0; bool mine = false;
again:
    /* one at a time: whoever meets a live EXPORTING waits */
    atomic { if
        :: DONE(0) || DONE(1) || removed[0] || removed[1] -> goto gone
        :: !(DONE(0) || DONE(1) || removed[0] || removed[1]) && txn == NONE -> txn = OPEN; txn_owner = me
        fi };
    if :: me == 0 -> may_die() :: else fi;
    atomic { log[0] = EXPORTING; by[0] = gen };       /* head CAS of session 0 */
    if :: me == 0 -> may_die() :: else fi;
    atomic { log[1] = EXPORTING; by[1] = gen };
    if :: me == 0 -> may_die() :: else fi;
#ifdef COMMIT_EARLY
    txn = COMMITTED;
    if :: me == 0 -> may_die() :: else fi;
#endif
    if
    :: got++                                          /* the last byte of the reply is out */
    :: me == 0 && !broke ->                           /* the connection broke first: abort, the client asks again */
        broke = true;
        atomic { txn = NONE; gen++ };
        goto again
    fi;
#ifndef COMMIT_EARLY
#ifdef NO_TXN
    log[0] = EXPORTED;
    if :: me == 0 -> may_die() :: else fi;
    log[1] = EXPORTED;
#else
    /* The reply is out and the commit is the next instruction. A kill between the two leaves a client with a reply whose
     * export is taken back: at-least-once, the one gap no order can close. The model excludes it: the claim is
     * about everything else. */
    txn = COMMITTED;
#endif
    if :: me == 0 -> may_die() :: else fi;
#endif
    finish(0);
    if :: me == 0 -> may_die() :: else fi;
    finish(1);
    if :: me == 0 -> may_die() :: else fi;
    atomic { txn = NONE; gen++ };
gone: finished++;
    goto end;
killed: dead = true;
end: skip
}

proctype supervisor() {
    do
    :: dead && !swept ->
        if
        :: txn == OPEN && txn_owner == 0 -> atomic { txn = NONE; gen++ }
        :: txn == COMMITTED && txn_owner == 0 -> finish(0); finish(1); atomic { txn = NONE; gen++ }
        :: else
        fi;
        swept = true; finished++
    :: finished == 2 -> break
    od;
    assert(txn == NONE);                                            /* E3 */
    assert(DONE(0) == DONE(1));                                     /* E2 */
    assert(removed[0] == removed[1]);
    assert(!DONE(0) || got == 1);                                   /* E1: exported means one whole reply */
    assert(got <= 1)
}

init { atomic { run exporter(0); run exporter(1); run supervisor() } }
