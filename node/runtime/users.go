// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// userDB is an image's /etc/passwd and /etc/group.
type userDB struct {
	users  []user.User
	groups []user.Group
}

func parseUserDB(passwd, group []byte) (userDB, error) {
	var db userDB
	var err error
	if db.users, err = user.ParsePasswd(bytes.NewReader(passwd)); err != nil {
		return userDB{}, fmt.Errorf("/etc/passwd: %w", err)
	}
	if db.groups, err = user.ParseGroup(bytes.NewReader(group)); err != nil {
		return userDB{}, fmt.Errorf("/etc/group: %w", err)
	}
	return db, nil
}

// lookup understands user, uid, user:group and uid:gid. A number need not be in /etc/passwd, a name must.
// groups are those of which the user is a member.
func (db userDB) lookup(who string) (u specs.User, groups []uint32, err error) {
	name, group, hasGroup := strings.Cut(who, ":")
	number, isNumber := parseID(name)
	member := ""
	found := false
	for _, e := range db.users {
		if (isNumber && e.Uid == int(number)) || (!isNumber && e.Name == name) {
			u.UID, u.GID, member, found = uint32(e.Uid), uint32(e.Gid), e.Name, true
			break
		}
	}
	if !found {
		if !isNumber {
			return specs.User{}, nil, fmt.Errorf("unable to find user %s: no matching entries in passwd file", name)
		}
		u.UID = number
	}
	if hasGroup {
		if u.GID, err = db.group(group); err != nil {
			return specs.User{}, nil, err
		}
	}
	if member != "" {
		for _, g := range db.groups {
			for _, m := range g.List {
				if m == member {
					groups = append(groups, uint32(g.Gid))
				}
			}
		}
	}
	return u, groups, nil
}

func (db userDB) group(name string) (uint32, error) {
	if id, ok := parseID(name); ok {
		return id, nil
	}
	for _, g := range db.groups {
		if g.Name == name {
			return uint32(g.Gid), nil
		}
	}
	return 0, fmt.Errorf("unable to find group %s: no matching entries in group file", name)
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < math.MaxUint32
}
