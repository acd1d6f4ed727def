/*
 * The refresh protocol: what xaiproxy's token_writer.py, token_lock.py, refresher/renewal.py and
 * refresher/schedule.py do with tokens.json, its lock and the issuer, checked by spin in every interleaving. test_model.py runs it; docs/login-safety.md lists what
 * follows from it and what does not.
 *
 * A label is a point at which the process can be killed, or any other process can run. One atomic is one
 * system call, or reads that only a writer without a lock could come between. A killed process loses its memory, its
 * flocks and nothing else: the page cache outlives it, so without power loss a rename before the fsync makes no
 * difference, and fsync is no step here.
 *
 * Time is left out. Any try may come before or after the window of 30 s, and any clock may be set: what holds here
 * holds by the count of tries alone. A try that begins although the count is used up is one that the design makes late
 * on purpose, shortly before expiry or after the API has refused the access token; property 2 does not count it.
 *
 * Sizes (-D): REFRESHERS, KILLS, LOSSES, REMOVALS of the lock file, TIDYINGS of tokens.json.new, FOREIGN writes of
 * tokens.json without a lock, SIGN_INS by xai-login, which
 * is a refresher that saves another login, FULL (1: the disk may fill up), TOKENS of the login.
 * PROPERTY: the one to check; 0 checks all. Each other macro takes a rule away.
 */

#ifndef PROPERTY
#define PROPERTY 0
#endif
#define claim(number, holds) assert(PROPERTY != 0 && PROPERTY != number || (holds))

#define WAIT_IS_A_STEP (REMOVALS || defined(WITHOUT_REREAD) || defined(WITHOUT_LOCK))

/* Refresh tokens. 0, 1, … are those of the login that is in the file at first; those of another login follow. */
#ifndef TOKENS
#define TOKENS 3
#endif
#define OTHER TOKENS            /* the other login's first */
#define LAST_OTHER (TOKENS + 1)
#define NONE 15                 /* there is no tokens.json */
#define TRIES 3                 /* schedule.LOST_TRIES */

/* tokens.json: a refresh token, refresh_try's count, refresh_error.terminal, and whether these two are about another
 * token: a program that keeps the members it does not know leaves them there when it writes its own tokens. */
byte file_token = 0, file_tries = 0;
bool file_terminal = false, file_stale = false;

/* tokens.json.new: absent, or without a whole login yet, or whole. */
#define ABSENT 0
#define ROOM 1
#define WHOLE 2
byte new_state = ABSENT, new_token = 0, new_replaces = 0, new_tries = 0;
bool new_terminal = false, new_stale = false;

/* Locks: tokens.json.lock is an inode at a path, and a removed one stays locked; the folder is always the same. */
byte lock_path = 1, inodes = 1;
bool lock_held[REMOVALS + 2], folder_held = false;

/* The issuer, of each login: the one refresh token that is good, and whether the family was revoked. */
byte good[2];
bool revoked[2];
byte in_flight[TOKENS + 2];     /* requests whose sender no longer waits, and that may still arrive */

/* What went wrong so far. */
byte kills = 0, losses = 0, removals = 0, tidyings = 0, foreign = 0, sign_ins = 0;
bool disk_full = false;

/* What the properties are about, of each refresh token. */
bool durable[TOKENS + 2];       /* its successor is in tokens.json.new or tokens.json */
byte presented[TOKENS + 2];     /* in time, without a definite answer */
byte charged[TOKENS + 2];       /* tries that were counted for it, less those given back */
bool excused[TOKENS + 2];       /* an answer to it was lost, or its sender was killed before the successor was written */
byte checking = 0;              /* processes between their last check of tokens.json and the rename over it */
bool overtaken = false;         /* a writer without a lock came just there */

#define family(token) (token >= OTHER)
#define left(token) (token != NONE && token != TOKENS - 1 && token != LAST_OTHER)  /* bounds the model */

inline issuer(token) {
    if
    :: !revoked[family(token)] && token == good[family(token)] -> good[family(token)]++; spent = true
    :: !revoked[family(token)] && token != good[family(token)] ->
        claim(3, excused[token]);
        revoked[family(token)] = true; spent = false
    :: else -> spent = false         /* of a family that was revoked */
    fi
}

/* Its successor is durable: sending it is against property 1 already, and the model has fewer states. */
inline forget(token) {
#if !TIDYINGS
    presented[token] = 0; charged[token] = 0
#else
    skip
#endif
}

#define or_killed :: kills < KILLS -> kills++; goto killed

#define counted(tries) (tries < TRIES -> tries + 1 : TRIES)

inline recorded_tries() {
#ifdef WITHOUT_COUNT_IN_RECORD
    write_tries = tries
#else
    write_tries = counted(tries)
#endif
}

inline begin_check() { checking++; in_check = true }
inline end_check() { checking--; in_check = false }

inline unlink_new() {
    new_state = ABSENT; new_token = 0; new_replaces = 0; new_tries = 0; new_terminal = false; new_stale = false
}

inline rename_new() {
    claim(7, new_state == WHOLE);
    if
    :: foreign > 0 && !overtaken -> claim(4, !(file_token == NONE || file_token >= OTHER) || new_token >= OTHER)
    :: else
    fi;
    file_token = new_token; file_tries = new_tries; file_terminal = new_terminal; file_stale = new_stale;
    unlink_new()
}


proctype Refresher() {
    byte inode = 0, token = 0, tries = 0, write_token = 0, write_tries = 0;
    bool has_lock = false, has_folder = false, in_check = false, sent = false, spent = false;
    bool write_terminal = false, recording = false, given_back = false, late = false;
#if defined(WITHOUT_SHARED_COUNT)
    byte memory_token = NONE, memory_tries = 0;
#endif

end_idle:
    /* token_writer.locked: open the lock file, or make it, and wait for both locks. While the lock file is not removed,
     * all of that is one step: a process that waits has changed nothing yet. */
    atomic {
#if WAIT_IS_A_STEP
        left(file_token);
#else
        left(file_token) && !lock_held[lock_path];
#endif
#ifdef WITHOUT_REREAD
        token = file_token; tries = file_tries;
#endif
        if :: lock_path == 0 -> inodes++; lock_path = inodes :: else fi;
        inode = lock_path;
#ifdef WITHOUT_LOCK
        goto adopt;
#elif !WAIT_IS_A_STEP
        lock_held[inode] = true; has_lock = true;
        goto adopt
#endif
    }
lock:
    atomic { if :: !lock_held[inode] -> lock_held[inode] = true; has_lock = true or_killed fi }
#ifndef WITHOUT_FOLDER_LOCK
lock_folder:
    atomic { if :: !folder_held -> folder_held = true; has_folder = true or_killed fi }
#endif
#ifndef WITHOUT_IDENTITY_CHECK
same_lock:
    atomic { if
        :: lock_path == inode
        :: lock_path != inode -> goto drop
        or_killed
    fi }
#endif

    /* TokenWriter.adopt_leftover */
adopt:
    atomic { if
#ifdef WITHOUT_ADOPTION
        :: unlink_new(); goto read
#else
        :: new_state == ABSENT -> goto read
#ifdef WITHOUT_REPLACES
        :: new_state == WHOLE -> begin_check()
        :: new_state == ROOM -> unlink_new(); goto read
#else
        :: new_state == WHOLE && new_replaces == file_token -> begin_check()
#ifdef WITHOUT_WHOLENESS
        :: new_state == ROOM -> begin_check()
#else
        :: new_state == ROOM -> unlink_new(); goto read
#endif
        :: new_state == WHOLE && new_replaces != file_token -> unlink_new(); goto read
#endif
#endif
        or_killed
    fi }
adopt_rename:
    atomic { if
        :: new_state != ABSENT -> end_check(); rename_new()
        :: new_state == ABSENT -> goto drop   /* removed: the rename fails */
        or_killed
    fi }

    /* Read again under the lock, and decide. */
read:
    atomic { if
        :: !left(file_token) -> goto drop
#if SIGN_INS
        :: sign_ins < SIGN_INS -> sign_ins++; token = file_token; write_token = OTHER; recording = true
#endif
        :: left(file_token) ->
#ifndef WITHOUT_REREAD
            token = file_token;
            tries = file_tries;
#endif
#ifndef WITHOUT_TOKEN_OF_TRY
            if :: file_stale -> tries = 0 :: else fi;
#endif
#ifdef WITHOUT_SHARED_COUNT
            if :: memory_token == token -> tries = memory_tries :: else -> tries = 0 fi;
#endif
            if
#ifdef WITHOUT_TOKEN_OF_TERMINAL
            :: file_terminal
#else
            :: file_terminal && !file_stale
#endif
                -> claim(5, revoked[family(token)]); goto drop
            :: else
            fi;
            write_token = token;
            if
            :: tries < TRIES
            :: tries >= TRIES -> claim(5, charged[token] >= TRIES); late = true
            :: tries >= TRIES -> goto drop
            fi;
#ifdef WITHOUT_COUNT_BEFORE
            write_tries = tries
#else
            write_tries = counted(tries)
#endif
        or_killed
    fi }
#ifdef WITHOUT_REHEARSAL
    goto same_lock_again;
#endif

    /* TokenWriter.save: the rehearsal, and later the record of a failure. */
save:
    atomic { if
        :: !disk_full -> new_state = ROOM
        :: disk_full -> unlink_new(); goto drop
        or_killed
    fi }
save_write:
    atomic { if
        :: new_state == ABSENT -> goto drop      /* its file was removed: the rename would fail */
        :: new_state != ABSENT ->
            new_state = WHOLE; new_token = write_token; new_replaces = token; new_tries = write_tries;
            new_terminal = write_terminal; new_stale = false;
            if :: !late && !recording -> charged[token]++ :: else fi
        or_killed
    fi }
save_check:
    atomic { if
#ifdef WITHOUT_CHECK_BEFORE_RENAME
        :: begin_check()
#else
        :: file_token == token -> begin_check()
        :: file_token != token -> unlink_new(); goto drop
#endif
        or_killed
    fi }
save_rename:
    atomic { if
        :: new_state == ABSENT -> goto drop
        :: new_state != ABSENT ->
            end_check();
            if :: !late && given_back -> charged[token]-- :: else fi;
            rename_new();
            if :: recording -> goto drop :: else fi;
            write_tries = 0
        or_killed
    fi }

    /* TokenWriter.reserve, and the last check before the refresh token is sent. */
reserve:
    atomic { if
        :: !disk_full -> new_state = ROOM
        :: disk_full -> goto drop
        or_killed
    fi }
same_lock_again:
    atomic { if
        :: file_token != token -> unlink_new(); goto drop
        :: file_token == token &&
#if defined(WITHOUT_IDENTITY_CHECK) || defined(WITHOUT_LOCK)
            true
#else
            lock_path == inode
        :: lock_path != inode -> goto drop
#endif
        :: goto drop                              /* SIGTERM */
        or_killed
    fi }
send:
    atomic { if
        :: claim(1, !durable[token]);
            if :: !late -> presented[token]++; claim(2, presented[token] <= TRIES) :: else fi;
#ifdef WITHOUT_SHARED_COUNT
            memory_token = token; memory_tries = tries + 1;
#endif
            sent = true
        or_killed
    fi }
await:
    atomic { if
        :: issuer(token); sent = false
        :: sent = false;                                    /* busy: nothing was spent, by the issuer's response */
            if :: !late -> presented[token]-- :: else fi;
#ifdef WITHOUT_GIVING_BACK
            write_tries = counted(tries);
#else
            write_tries = tries;
#endif
            given_back = true;
            goto failed
        :: losses < LOSSES -> losses++; excused[token] = true; sent = false;
            if :: in_flight[token]++ :: true fi;
            recorded_tries();
            goto failed
#ifdef WITHOUT_DEAF_TO_SIGTERM
        :: in_flight[token]++; sent = false; goto drop
#endif
        or_killed
    fi }
answered:
    atomic { if
        :: spent
        :: !spent -> write_terminal = true; write_tries = counted(tries);
            if
            :: file_token == token -> goto failed
            :: else -> unlink_new(); goto drop   /* another login is there: it is used */
            fi
        :: losses < LOSSES -> losses++; excused[token] = true; spent = false; recorded_tries(); goto failed
#ifdef WITHOUT_DEAF_TO_SIGTERM
        :: spent = false; goto drop
#endif
        or_killed
    fi }

    /* Reserved.commit: the successor is in memory only until this is done, and the lock is kept. */
commit:
    atomic { if
        :: claim(6, !disk_full || new_state != ABSENT || tidyings > 0);
            new_state = WHOLE; new_token = token + 1; new_replaces = token; new_terminal = false;
#ifdef WITHOUT_REMOVAL_OF_TRY
            new_tries = file_tries; new_stale = true;
#else
            new_tries = 0; new_stale = false;
#endif
            durable[token] = true;
            forget(token)
#ifdef WITHOUT_SAVING_AGAIN
        :: spent = false; unlink_new(); goto drop
#endif
        or_killed
    fi }
commit_check:
    atomic { if
#ifdef WITHOUT_CHECK_BEFORE_RENAME
        :: begin_check()
#else
        :: file_token == token -> begin_check()
        :: file_token != token -> unlink_new(); spent = false; goto drop
#endif
        or_killed
    fi }
commit_rename:
    atomic { if
        :: new_state == ABSENT -> end_check(); goto commit    /* removed: begin with a new file */
        :: new_state != ABSENT -> end_check(); rename_new(); spent = false; goto drop
        or_killed
    fi }

    /* Refresher._failed: give the room back, and record the failure. */
failed:
    atomic { if :: unlink_new(); recording = true; goto save or_killed fi }

    /* Where a process is killed. A label within an atomic is reached by a jump that lets no other process run in between. */
    /* `sent`: its request is on the way; `spent`: the issuer has acted on it. */
    atomic {
        skip;
killed:
        if :: (sent || spent) && !durable[token] -> excused[token] = true :: else fi;
        if
        :: sent -> in_flight[token]++   /* the bytes are in the kernel's or the issuer's buffers */
        :: true                         /* or were not sent yet, or were thrown away */
        fi;
        goto drop
    }
    /* The end of a try, or of the process: all locks and the whole memory are gone. */
    atomic {
        skip;
drop:
        if :: has_lock -> lock_held[inode] = false; has_lock = false :: else fi;
        if :: has_folder -> folder_held = false; has_folder = false :: else fi;
        if :: in_check -> end_check() :: else fi;
        inode = 0; token = 0; tries = 0; write_token = 0; write_tries = 0;
        write_terminal = false; recording = false; given_back = false; late = false; sent = false; spent = false;
        goto end_idle
    }
}

#define arrives(token) atomic { in_flight[token] > 0 -> in_flight[token]--; issuer(token); spent = false }

/* What comes from outside, at any time. */
active proctype World() {
    bool spent;
end:
    do
    :: atomic { removals < REMOVALS && lock_path != 0 -> removals++; lock_path = 0 }
    :: atomic { tidyings < TIDYINGS && new_state != ABSENT -> tidyings++;
        if :: new_state == WHOLE && new_token != new_replaces -> durable[new_replaces] = false; excused[new_replaces] = true
        :: else fi;
        unlink_new() }
    :: atomic { foreign < FOREIGN -> foreign++;
        if :: checking > 0 -> overtaken = true :: else fi;
        if
        :: file_token = NONE; file_tries = 0; file_terminal = false; file_stale = false
        :: file_token = OTHER; file_tries = 0; file_terminal = false; file_stale = false
        :: file_token = OTHER; file_stale = true
#ifdef WITH_A_RESTORED_FILE
        :: file_token = 0; file_tries = 0; file_terminal = false; file_stale = false
#endif
        fi }
#if FULL
    :: atomic { !disk_full -> disk_full = true }
#endif
    :: arrives(0) :: arrives(1) :: arrives(2) :: arrives(3)
#if TOKENS > 2
    :: arrives(4)
#endif
    od
}

init {
    byte n;
    atomic {
        good[1] = OTHER;
        n = 0;
        do :: n < REFRESHERS -> run Refresher(); n++ :: else -> break od
    }
}
