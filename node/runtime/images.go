// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageInfo is one image: a config, with all names that lead to it. Everything but names and users is constant.
type imageInfo struct {
	id      string // digest of the config
	target  digest.Digest
	chainID string // of the unpacked layers
	config  ocispec.ImageConfig
	size    int64

	reading  sync.Mutex // held while the image's users are being read
	mu       sync.Mutex
	names    []string // sorted
	digested string   // repository@digest
	users    *userDB
}

// imageIndex is all images of the node in memory: small, and asked for at every start of a container.
type imageIndex struct {
	mu   sync.Mutex
	byID map[string]*imageInfo
	pins map[string]bool // names that archives on this host gave
}

func (x *imageIndex) find(id string) (*imageInfo, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if i := x.byID[id]; i != nil {
		return i, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrImageNotFound, id)
}

// byName finds the image that a normalised reference, or a config digest, names.
func (x *imageIndex) byName(ref string) *imageInfo {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range x.byID {
		if i.id == ref || i.named(ref) {
			return i
		}
	}
	return nil
}

func (i *imageInfo) named(ref string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Contains(i.names, ref)
}

func (i *imageInfo) public() Image {
	i.mu.Lock()
	defer i.mu.Unlock()
	img := Image{ID: i.id, Digest: i.digested, Size: i.size, User: i.config.User}
	for _, n := range i.names {
		if !strings.Contains(n, "@") {
			img.Tags = append(img.Tags, n)
		}
	}
	return img
}

// Normalize completes a reference: busybox is docker.io/library/busybox:latest. A config digest stays.
func Normalize(ref string) (string, error) {
	if _, err := digest.Parse(ref); err == nil {
		return ref, nil
	}
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("couldn't parse image name %q: %w", ref, err)
	}
	return named.String(), nil
}

// pin keeps what archives on this host named from being collected.
func (x *imageIndex) pin(imports map[string]imported) {
	pins := map[string]bool{}
	for _, a := range imports {
		for _, name := range a.Images {
			pins[name] = true
		}
	}
	x.mu.Lock()
	x.pins = pins
	x.mu.Unlock()
}

// loadImages reads containerd's image store into the index.
func (r *Runtime) loadImages(ctx context.Context) error {
	all, err := r.client.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	for _, i := range all {
		if _, err := r.addImage(ctx, i); err != nil {
			// Content can be missing after a full disk or an interrupted pull; a new pull mends it.
			r.log.Warn("image is incomplete and ignored", "image", i.Name, "error", err)
		}
	}
	return nil
}

// addImage puts one named image of containerd's store into the index.
func (r *Runtime) addImage(ctx context.Context, i images.Image) (*imageInfo, error) {
	info, err := r.describe(ctx, i)
	if err != nil {
		return nil, err
	}
	x := &r.images
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, other := range x.byID {
		// The name may have pointed to another image.
		other.mu.Lock()
		other.names = slices.DeleteFunc(other.names, func(n string) bool { return n == i.Name })
		other.mu.Unlock()
	}
	if known := x.byID[info.id]; known != nil {
		info = known
	} else {
		x.byID[info.id] = info
	}
	info.mu.Lock()
	info.names = append(info.names, i.Name)
	slices.Sort(info.names)
	if named, err := reference.ParseDockerRef(i.Name); err == nil && (info.digested == "" || !strings.Contains(i.Name, "@")) {
		info.digested = named.Name() + "@" + i.Target.Digest.String()
	} else if info.digested == "" {
		info.digested = i.Target.Digest.String()
	}
	info.mu.Unlock()
	for id, other := range x.byID {
		if other.nameless() {
			delete(x.byID, id)
		}
	}
	return info, nil
}

func (i *imageInfo) nameless() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.names) == 0
}

// describe reads manifest and config of an image for this machine's platform.
func (r *Runtime) describe(ctx context.Context, i images.Image) (*imageInfo, error) {
	store := r.client.ContentStore()
	manifest, err := images.Manifest(ctx, store, i.Target, platforms.Default())
	if err != nil {
		return nil, err
	}
	data, err := content.ReadBlob(ctx, store, manifest.Config)
	if err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("config of %s: %w", i.Name, err)
	}
	info := &imageInfo{
		id: manifest.Config.Digest.String(), target: i.Target.Digest,
		chainID: identity.ChainID(config.RootFS.DiffIDs).String(), config: config.Config, size: manifest.Config.Size,
	}
	for _, l := range manifest.Layers {
		info.size += l.Size
	}
	return info, nil
}

// ImageStore implements Images.
type ImageStore struct{ r *Runtime }

var _ Images = ImageStore{}

// Images returns the node's image store.
func (r *Runtime) Images() ImageStore { return ImageStore{r} }

// Get finds an image by reference or by the digest of its config.
func (s ImageStore) Get(_ context.Context, ref string) (Image, error) {
	name, err := Normalize(ref)
	if err != nil {
		return Image{}, err
	}
	if i := s.r.images.byName(name); i != nil {
		return i.public(), nil
	}
	return Image{}, fmt.Errorf("%w: %s", ErrImageNotFound, ref)
}

// List reports every image.
func (s ImageStore) List(context.Context) ([]Image, error) {
	x := &s.r.images
	x.mu.Lock()
	defer x.mu.Unlock()
	all := make([]Image, 0, len(x.byID))
	for _, i := range x.byID {
		img := i.public()
		img.Pinned = slices.ContainsFunc(img.Tags, func(t string) bool { return x.pins[t] })
		all = append(all, img)
	}
	slices.SortFunc(all, func(a, b Image) int { return strings.Compare(a.ID, b.ID) })
	return all, nil
}

// Remove removes an image with all its names. Containers that were made of it keep their layers.
func (s ImageStore) Remove(ctx context.Context, id string) error {
	r, ctx := s.r, s.r.in(ctx)
	info, err := r.images.find(id)
	if err != nil {
		return err
	}
	info.mu.Lock()
	names := slices.Clone(info.names)
	info.mu.Unlock()
	for n, name := range names {
		var opts []images.DeleteOpt
		if n == len(names)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := r.client.ImageService().Delete(ctx, name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove image %s: %w", name, err)
		}
	}
	r.images.mu.Lock()
	delete(r.images.byID, id)
	r.images.mu.Unlock()
	return nil
}

// unpack makes the snapshots of an image's layers.
func (r *Runtime) unpack(ctx context.Context, info *imageInfo) error {
	info.mu.Lock()
	name := ""
	if len(info.names) > 0 {
		name = info.names[0]
	}
	info.mu.Unlock()
	i, err := r.client.ImageService().Get(ctx, name)
	if err != nil {
		return err
	}
	return client.NewImage(r.client, i).Unpack(ctx, r.snapshotter)
}

// maxUserDB bounds what is read of an image's /etc/passwd and /etc/group.
const maxUserDB = 4 << 20

// users reads the image's user database, once. A container's root file system is the image's when its user
// is looked up, so the image can be asked.
func (r *Runtime) users(ctx context.Context, info *imageInfo) (userDB, error) {
	// One reader at a time: they share the name of the snapshot to read from.
	info.reading.Lock()
	defer info.reading.Unlock()
	info.mu.Lock()
	known := info.users
	info.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	key := "users-" + info.id
	mounts, err := r.view(ctx, info, key, snapshots.WithLabels(map[string]string{rootLabel: "users"}))
	if err != nil {
		return userDB{}, err
	}
	defer func() { _ = r.client.SnapshotService(r.snapshotter).Remove(context.WithoutCancel(ctx), key) }()
	var db userDB
	err = mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		passwd, err := readBounded(root, "/etc/passwd")
		if err != nil {
			return err
		}
		group, err := readBounded(root, "/etc/group")
		if err != nil {
			return err
		}
		db, err = parseUserDB(passwd, group)
		return err
	})
	if err != nil {
		return userDB{}, err
	}
	info.mu.Lock()
	info.users = &db
	info.mu.Unlock()
	return db, nil
}

// readBounded reads a file inside root; one that is not there is empty.
func readBounded(root, name string) ([]byte, error) {
	path, err := securejoin.SecureJoin(root, name)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxUserDB))
}
