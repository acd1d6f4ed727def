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
 * One program searches all variants. Each takes its sizes, and the rules that it leaves out, from the environment; what is
 * not set is 0. They do not change during a search, and are not part of a state.
 */

/* TOKENS of the login, at most 3. REMOVALS of the lock file, at most 2. TIDYINGS of tokens.json.new. FOREIGN writes of
 * tokens.json without a lock. SIGN_INS by xai-login, which is a refresher that saves another login. FULL: the disk may
 * fill up. PROPERTY: the one to check; 0 checks all. */
hidden byte REFRESHERS, TOKENS, KILLS, LOSSES, REMOVALS, TIDYINGS, FOREIGN, SIGN_INS, PROPERTY;
hidden byte FULL, WITH_A_RESTORED_FILE;
hidden byte WITHOUT_LOCK, WITHOUT_FOLDER_LOCK, WITHOUT_IDENTITY_CHECK, WITHOUT_REREAD;
hidden byte WITHOUT_ADOPTION, WITHOUT_REPLACES, WITHOUT_WHOLENESS, WITHOUT_CHECK_BEFORE_RENAME;
hidden byte WITHOUT_COUNT_BEFORE, WITHOUT_COUNT_IN_RECORD, WITHOUT_SHARED_COUNT, WITHOUT_GIVING_BACK;
hidden byte WITHOUT_TOKEN_OF_TRY, WITHOUT_REMOVAL_OF_TRY, WITHOUT_TOKEN_OF_TERMINAL;
hidden byte WITHOUT_REHEARSAL, WITHOUT_SAVING_AGAIN, WITHOUT_DEAF_TO_SIGTERM;
#define choose(name) name = getenv(#name) ? atoi(getenv(#name)) : 0

#define claim(number, holds) assert(PROPERTY != 0 && PROPERTY != number || (holds))

#define WAIT_IS_A_STEP (REMOVALS > 0 || WITHOUT_REREAD || WITHOUT_LOCK)

/* Refresh tokens. 0, 1, … are those of the login that is in the file at first; those of another login follow. */
#define MOST_TOKENS 5           /* of both logins */
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
bool lock_held[4], folder_held = false;

/* The issuer, of each login: the one refresh token that is good, and whether the family was revoked. */
byte good[2];
bool revoked[2];
byte in_flight[MOST_TOKENS];     /* requests whose sender no longer waits, and that may still arrive */

/* What went wrong so far. */
byte kills = 0, losses = 0, removals = 0, tidyings = 0, foreign = 0, sign_ins = 0;
bool disk_full = false;

/* What the properties are about, of each refresh token. */
bool durable[MOST_TOKENS];       /* its successor is in tokens.json.new or tokens.json */
byte presented[MOST_TOKENS];     /* in time, without a definite answer */
byte charged[MOST_TOKENS];       /* tries that were counted for it, less those given back */
bool excused[MOST_TOKENS];       /* an answer to it was lost, or its sender was killed before the successor was written */
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
    if :: TIDYINGS == 0 -> presented[token] = 0; charged[token] = 0 :: else fi
}

#define or_killed :: kills < KILLS -> kills++; goto killed

#define counted(tries) (tries < TRIES -> tries + 1 : TRIES)

inline recorded_tries() {
    write_tries = (WITHOUT_COUNT_IN_RECORD -> tries : counted(tries))
}

#define same_lock_file (lock_path == inode || WITHOUT_IDENTITY_CHECK || WITHOUT_LOCK)
#define adoptable (new_state == WHOLE && (new_replaces == file_token || WITHOUT_REPLACES) \
    || new_state == ROOM && WITHOUT_WHOLENESS)
#define not_overtaken (file_token == token || WITHOUT_CHECK_BEFORE_RENAME)

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
    byte memory_token = NONE, memory_tries = 0;  /* only WITHOUT_SHARED_COUNT */

end_idle:
    /* token_writer.locked: open the lock file, or make it, and wait for both locks. While the lock file is not removed,
     * all of that is one step: a process that waits has changed nothing yet. */
    atomic {
        left(file_token) && (WAIT_IS_A_STEP || !lock_held[lock_path]);
        if :: WITHOUT_REREAD -> token = file_token; tries = file_tries :: else fi;
        if :: lock_path == 0 -> inodes++; lock_path = inodes :: else fi;
        inode = lock_path;
        if
        :: WITHOUT_LOCK -> goto adopt
        :: !WAIT_IS_A_STEP -> lock_held[inode] = true; has_lock = true; goto adopt
        :: else
        fi
    }
lock:
    atomic { if :: !lock_held[inode] -> lock_held[inode] = true; has_lock = true or_killed fi }
lock_folder:
    atomic { if
        :: WITHOUT_FOLDER_LOCK
        :: !WITHOUT_FOLDER_LOCK && !folder_held -> folder_held = true; has_folder = true
        or_killed
    fi }
same_lock:
    atomic { if
        :: same_lock_file
        :: !same_lock_file -> goto drop
        or_killed
    fi }

    /* TokenWriter.adopt_leftover */
adopt:
    atomic { if
        :: !WITHOUT_ADOPTION && adoptable -> begin_check()
        :: WITHOUT_ADOPTION || !adoptable -> unlink_new(); goto read
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
        :: sign_ins < SIGN_INS -> sign_ins++; token = file_token; write_token = OTHER; recording = true
        :: left(file_token) ->
            if :: !WITHOUT_REREAD -> token = file_token; tries = file_tries :: else fi;
            if :: file_stale && !WITHOUT_TOKEN_OF_TRY -> tries = 0 :: else fi;
            if :: WITHOUT_SHARED_COUNT -> tries = (memory_token == token -> memory_tries : 0) :: else fi;
            if
            :: file_terminal && (!file_stale || WITHOUT_TOKEN_OF_TERMINAL)
                -> claim(5, revoked[family(token)]); goto drop
            :: else
            fi;
            write_token = token;
            if
            :: tries < TRIES
            :: tries >= TRIES -> claim(5, charged[token] >= TRIES); late = true
            :: tries >= TRIES -> goto drop
            fi;
            write_tries = (WITHOUT_COUNT_BEFORE -> tries : counted(tries));
            if :: WITHOUT_REHEARSAL -> goto same_lock_again :: else fi
        or_killed
    fi }

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
        :: not_overtaken -> begin_check()
        :: !not_overtaken -> unlink_new(); goto drop
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
        :: file_token == token && same_lock_file
        :: !same_lock_file -> goto drop
        :: goto drop                              /* SIGTERM */
        or_killed
    fi }
send:
    atomic { if
        :: claim(1, !durable[token]);
            if :: !late -> presented[token]++; claim(2, presented[token] <= TRIES) :: else fi;
            if :: WITHOUT_SHARED_COUNT -> memory_token = token; memory_tries = tries + 1 :: else fi;
            sent = true
        or_killed
    fi }
await:
    atomic { if
        :: issuer(token); sent = false
        :: sent = false;                                    /* busy: nothing was spent, by the issuer's response */
            if :: !late -> presented[token]-- :: else fi;
            write_tries = (WITHOUT_GIVING_BACK -> counted(tries) : tries);
            given_back = true;
            goto failed
        :: losses < LOSSES -> losses++; excused[token] = true; sent = false;
            if :: in_flight[token]++ :: true fi;
            recorded_tries();
            goto failed
        :: WITHOUT_DEAF_TO_SIGTERM -> in_flight[token]++; sent = false; goto drop
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
        :: WITHOUT_DEAF_TO_SIGTERM -> spent = false; goto drop
        or_killed
    fi }

    /* Reserved.commit: the successor is in memory only until this is done, and the lock is kept. */
commit:
    atomic { if
        :: claim(6, !disk_full || new_state != ABSENT || tidyings > 0);
            new_state = WHOLE; new_token = token + 1; new_replaces = token; new_terminal = false;
            new_tries = (WITHOUT_REMOVAL_OF_TRY -> file_tries : 0); new_stale = WITHOUT_REMOVAL_OF_TRY;
            durable[token] = true;
            forget(token)
        :: WITHOUT_SAVING_AGAIN -> spent = false; unlink_new(); goto drop
        or_killed
    fi }
commit_check:
    atomic { if
        :: not_overtaken -> begin_check()
        :: !not_overtaken -> unlink_new(); spent = false; goto drop
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
        :: WITH_A_RESTORED_FILE -> file_token = 0; file_tries = 0; file_terminal = false; file_stale = false
        fi }
    :: atomic { FULL && !disk_full -> disk_full = true }
    :: arrives(0) :: arrives(1) :: arrives(2) :: arrives(3) :: arrives(4)
    od
}

init {
    byte n;
    atomic {
        c_code {
            choose(REFRESHERS); choose(TOKENS); choose(KILLS); choose(LOSSES); choose(REMOVALS); choose(TIDYINGS);
            choose(FOREIGN); choose(SIGN_INS); choose(PROPERTY); choose(FULL); choose(WITH_A_RESTORED_FILE);
            choose(WITHOUT_LOCK); choose(WITHOUT_FOLDER_LOCK); choose(WITHOUT_IDENTITY_CHECK); choose(WITHOUT_REREAD);
            choose(WITHOUT_ADOPTION); choose(WITHOUT_REPLACES); choose(WITHOUT_WHOLENESS);
            choose(WITHOUT_CHECK_BEFORE_RENAME); choose(WITHOUT_COUNT_BEFORE); choose(WITHOUT_COUNT_IN_RECORD);
            choose(WITHOUT_SHARED_COUNT); choose(WITHOUT_GIVING_BACK); choose(WITHOUT_TOKEN_OF_TRY);
            choose(WITHOUT_REMOVAL_OF_TRY); choose(WITHOUT_TOKEN_OF_TERMINAL); choose(WITHOUT_REHEARSAL);
            choose(WITHOUT_SAVING_AGAIN); choose(WITHOUT_DEAF_TO_SIGTERM);
        };
        good[1] = OTHER;
        n = 0;
        do :: n < REFRESHERS -> run Refresher(); n++ :: else -> break od
    }
}
